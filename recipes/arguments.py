"""The arguments of all recipes, as dataclasses, and one parser: a YAML file first, then `--key value` for whatever
differs.

The precedence is dataclass default < YAML < command line. A key that no dataclass has is an error, in the file and on
the command line, and names the nearest keys that exist.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from transformers import HfArgumentParser

import ring_hf
from ring_hf.data.run_options import (
    DataArguments,
    SourceArguments,
    explain_unknown,
    load_yaml,
    option,
    parse_mapping,
)
from ring_hf.text import HelpFormatter

__all__ = [
    "DataArguments",
    "MemoryArguments",
    "ModelArguments",
    "ParallelArguments",
    "PerplexityArguments",
    "SourceArguments",
    "option",
    "parse",
]


@dataclass
class ModelArguments:
    """The model, and its positions and attention at the target length."""

    model: str | None = option(None, "Hub id or folder of a causal language model.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    model_config: dict | str | None = option(
        None,
        "Instead of `model`: build a new one from this mapping of model_type and sizes. Vocabulary size and special "
        "tokens come from the tokenizer.",
    )
    tokenizer: str | None = option(None, "Hub id, folder, or `bytes` (one token per byte). Default: the model's.")
    attn_implementation: str = option(
        "ring_zigzag", "A backend of ring_hf; in one process also any of Transformers, such as sdpa."
    )
    dtype: str = option("float32", "Type of the weights. For mixed precision keep float32 and set bf16.")
    rope_theta: float | None = option(None, "RoPE base for the target length; the rest of RoPE does not change.")
    rope_parameters: dict | str | None = option(
        None,
        "All of RoPE in the format of Transformers 5, as {rope_type: yarn, factor: 8.0, rope_theta: 10000.0}.",
    )

    vision_vocabulary: bool = option(
        False, "Add embeddings for vision codes (8,448 rows), for sources of the format vision_codes."
    )

    def __post_init__(self) -> None:
        self.model_config = parse_mapping("model_config", self.model_config)
        self.rope_parameters = parse_mapping("rope_parameters", self.rope_parameters)
        if (self.model is None) == (self.model_config is None):
            raise ValueError(
                f"model={self.model!r} and model_config={self.model_config!r}: give exactly one, a model to load or "
                "the configuration of a new one."
            )
        if self.rope_theta is not None and self.rope_parameters is not None:
            raise ValueError(
                f"rope_theta={self.rope_theta} and rope_parameters={self.rope_parameters} are both given. Put "
                "rope_theta into rope_parameters."
            )


@dataclass
class ParallelArguments:
    """Which processes share a sequence, and how."""

    context_parallel_size: int | None = option(
        None,
        "Processes that share a sequence; 1 is plain data parallelism. Default: RING_HF_CONTEXT_PARALLEL_SIZE of the "
        "launch line; several processes need one of the two.",
    )
    dp_replicate_size: int | None = option(
        None, "Copies of the weights; with FSDP2 more than one is HSDP. Default: 1 with FSDP2, else one per sequence."
    )
    ulysses_size: str | None = option(
        None, "Processes that exchange heads instead of keys and values, or `auto` for as many as the heads allow."
    )
    inner_ring_size: int | None = option(None, "Processes of an inner ring (those of a node) of a double ring.")
    head_chunks: int | None = option(
        None, "Number of chunks in which heads are exchanged, to save memory. Default: all at once."
    )
    transport: str | None = option(
        None, "How keys and values travel: ring, double_ring, allgather or direct. Default: auto, by estimate."
    )
    overlap: bool = option(True, "Exchange keys and values while computing.")
    kernel: str = option("auto", "Attention kernel of a tile, or a family of them; auto takes the fastest that fits.")

    def config(self) -> ring_hf.ContextParallelConfig:
        """Return the object for `TrainingArguments(parallelism_config=...)`."""
        ulysses: Any = self.ulysses_size  # text on the command line, perhaps a number in a YAML file
        if isinstance(ulysses, str) and ulysses.isdigit():
            ulysses = int(ulysses)
        return ring_hf.ContextParallelConfig(**{**dataclasses.asdict(self), "ulysses_size": ulysses})


@dataclass
class MemoryArguments:
    """Memory options of a training step; none changes its results."""

    memory_attention: str = option(
        "none",
        "Tensors that a layer keeps for the backward pass: none (all), recompute (its input) or save (its input and "
        "the result of attention, so that attention runs once). Leave activation_checkpointing off with it.",
    )
    memory_offload: str | None = option(
        None, "Which of them are kept in host memory: attention (its results), layers (the inputs) or all."
    )
    ffn_block: str | None = option(None, "Tokens at a time in feed-forward layers, or `auto`. Default: all.")
    loss_block: str | None = option(None, "Tokens at a time in the LM head and the loss, or `auto`. Default: all.")

    def config(self) -> ring_hf.memory.MemoryConfig:
        """Return the options of `ring_hf.memory.apply`."""
        blocks: list[Any] = [self.ffn_block, self.loss_block]  # text on the command line, perhaps numbers in YAML
        ffn, loss = (int(block) if isinstance(block, str) and block.isdigit() else block for block in blocks)
        return ring_hf.memory.MemoryConfig(self.memory_attention, self.memory_offload, ffn, loss)


@dataclass
class RunArguments:
    """Batch and budget in tokens, perplexity by length, and the first state of the optimizer."""

    tokens_per_batch: str | None = option(
        None, "Tokens of an optimizer step over all processes, as 4M (4 * 2**20): sets gradient_accumulation_steps."
    )
    max_tokens: str | None = option(None, "Tokens to train on, as 4.8B (decimal): sets max_steps.")
    perplexity_lengths: list[int] = option(
        [], "Context lengths at which held-out perplexity is measured when training ends; each divides the longest."
    )
    perplexity_windows: int = option(16, "Most windows of the longest of them.")
    until_perplexity: float | None = option(
        None,
        "End training when held-out perplexity at the shortest of perplexity_lengths is at most this; measured at "
        "every evaluation.",
    )
    evaluate_only: bool = option(False, "Measure perplexity_lengths and train nothing.")
    optimizer_from: str | None = option(
        None, "Checkpoint whose optimizer state training starts with; its learning rates are those of this run."
    )
    card_notes: str | None = option(None, "Markdown file whose text becomes a part of the model card.")
    verify_steps: int = option(
        0,
        "Before training, compare this many batches with one process: each rank also computes the whole sequences, "
        "for which it needs the memory of one process. A difference ends the run with its layer and tokens.",
    )
    verify_length: int | None = option(
        None, "Tokens of a row that verify_steps compares, to save memory. Default: all."
    )
    verify_only: bool = option(False, "End after verify_steps, with the verdict in output_dir/verification.json.")
    peak_tflops: float | None = option(
        None, "Dense bf16 TFLOP/s of a device, by which MFU is logged. Default: the data sheet of known GPUs."
    )

    def __post_init__(self) -> None:
        if self.verify_steps < 0:
            raise ValueError(f"verify_steps={self.verify_steps} must be at least 0, which compares nothing.")
        for key in ("verify_length", "verify_only"):
            if getattr(self, key) and not self.verify_steps:
                raise ValueError(
                    f"{key}={getattr(self, key)} with verify_steps=0, which compares nothing. Set it to 1."
                )
        if self.verify_steps and self.evaluate_only:
            raise ValueError(f"verify_steps={self.verify_steps} compares training steps; evaluate_only has none.")
        if (self.until_perplexity is not None or self.evaluate_only) and not self.perplexity_lengths:
            key = "evaluate_only" if self.evaluate_only else "until_perplexity"
            raise ValueError(f"{key}={getattr(self, key)} measures at perplexity_lengths, which is empty. Set it.")


@dataclass
class PerplexityArguments:
    """The models to measure, the context lengths, and the folder of the results."""

    models: list[str] = option(
        [], "Each `name=folder or hub id`, or `name=perplexity.json` of an earlier measurement."
    )
    lengths: list[int] = option([512, 1024, 2048, 4096], "Context lengths; each divides the longest.")
    trained_lengths: list[int] = option([], "Context length each model was trained at, for the plot.")
    max_windows: int = option(16, "Most windows of the longest length to measure.")
    tokens_per_batch: int = option(8192, "Tokens measured at once; bounds the memory of the logits.")
    attention: str = option("sdpa", "attn_implementation of the measurement, which is in one process.")
    title: str = option("Held-out perplexity by context length", "Heading of the plot.")
    output_dir: str = option("runs/perplexity", "Folder for perplexity.json, perplexity.md and perplexity.png.")


class _HelpFormatter(HelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the commands of a description in lines that can be copied, and shows defaults."""


def parse(
    dataclass_types: tuple[Any, ...], description: str, argv: list[str] | None = None, **defaults: Any
) -> tuple[Any, ...]:
    """Parse `[run.yaml] [--key value ...]` into one instance per dataclass.

    Args:
        dataclass_types: their fields are the keys.
        description (`str`): shown by --help.
        argv (*optional*): instead of the command line.
        defaults: values that replace the dataclasses' own defaults; YAML and command line override them.

    Raises:
        ValueError: if a key does not exist or a value is not allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = "%(prog)s [run.yaml] [--key value ...]"
    parser = HfArgumentParser(
        dataclass_types, description=description, usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    keys = {f.name for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type) if f.init}
    parser.set_defaults(**defaults)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**load_yaml(argv.pop(0), keys))
    known, unknown = parser.parse_known_args(argv)  # before any dataclass checks its values
    if unknown:
        unknown_keys = [argument.lstrip("-").partition("=")[0] for argument in unknown]
        raise ValueError(explain_unknown("the command line", unknown_keys, keys))
    values = vars(known)
    return tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in dataclass_types)
