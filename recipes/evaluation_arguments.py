"""The arguments of `evaluate.py`, and what they say about grid, text and models."""

import json
from dataclasses import dataclass
from pathlib import Path

from arguments import option
from transformers import AutoConfig

from ring_hf.data.run_options import SourceArguments
from ring_hf.evaluation.retrieval_grid import GridSpec
from ring_hf.evaluation.short_context import automatic_length
from ring_hf.evaluation.sliding_perplexity import PerplexitySpec
from ring_hf.evaluation.task_registry import split_tasks
from ring_hf.hf.pretrained import load_pretrained


@dataclass
class EvaluationArguments:
    """The models, the tasks, and how a sequence is shared."""

    models: list[str] = option([], "Each `name=folder or hub id`; with several, the first is the one before.")
    tasks: list[str] = option(["needle"], "Names of tasks; see above.")
    lengths: list[int] = option([1024, 2048, 4096], "Tokens of the prompts, and of context for perplexity.")
    num_depths: int = option(10, "Depths at which the fact that is asked for is hidden, at equal distances.")
    rounds: int = option(3, "Examples for each length and depth.")
    seed: int = option(0, "Of all examples.")
    text: str = option("builtin", "Source of the text: files, a dataset of the hub, or `builtin`.")
    heldout_data: str | None = option(
        None, "Source of the text for perplexity. Default: the tenth of `text` that recipes/finetune.py holds out."
    )
    perplexity_tokens: int = option(65536, "Tokens of text for perplexity; at least the longest length.")
    stride: int | None = option(None, "Tokens by which a window moves over the text. Default: half of its length.")
    short_context_length: int | None = option(
        None,
        "Tokens of context of the check that short text is predicted as well as before; 0: no check. Default: the "
        "length that the first model was made for, within 512 to 2,048.",
    )
    short_context_margin: float = option(0.03, "Share by which perplexity at that length may rise without a warning.")
    reference: str | None = option(None, "Name of the model that the check compares with. Default: the first.")
    context_parallel_size: int | None = option(
        None, "Processes that share a sequence. Default: all; other processes would repeat the same."
    )
    attn_implementation: str = option("ring_zigzag", "A backend of ring_hf.")
    dtype: str = option("auto", "Type of the weights and the KV cache; `auto` is that of the files.")
    prefill_chunk_size: int | None = option(None, "Tokens of a prompt at a time, to save memory. Default: all.")
    tokens_per_batch: int = option(8192, "Tokens of short windows that are measured at once.")
    output_dir: str = option("runs/retrieval", "Folder of the results.")

    def named_models(self) -> dict[str, str]:
        """Return the folder or hub id of each model by its name.

        Raises:
            ValueError: if there is no model, two have one name and would share a file of results, or the reference is
                none of them.
        """
        sources: dict[str, str] = {}
        for entry in self.models:
            name, separator, source = entry.partition("=")
            name, source = (name, source) if separator else (Path(entry).name, entry)
            if name in sources:
                raise ValueError(
                    f"models: {sources[name]} and {source} are both named {name!r}. Write name=folder for each."
                )
            sources[name] = source
        if not sources:
            raise ValueError("models is empty: nothing to measure. Give --models name=folder, once or several times.")
        if self.reference is not None and self.reference not in sources:
            raise ValueError(f"reference={self.reference!r} is none of the models ({', '.join(sources)}).")
        return sources

    def grid(self) -> GridSpec | None:
        """Return the prompts to answer, or None without a retrieval task."""
        tasks, _ = split_tasks(self.tasks)
        return GridSpec(tasks, tuple(self.lengths), self.num_depths, self.rounds, self.seed) if tasks else None

    def short_length(self, first_model: str) -> int:
        """Return the tokens of context of the short-context check; 0: no check.

        Raises:
            ValueError: if there is no check although it is a task, or a model cannot be loaded.
        """
        if self.short_context_length == 0 and "short_context" in self.tasks:
            raise ValueError("short_context is a task and short_context_length=0 switches it off. Drop one of them.")
        if self.short_context_length is not None:
            return self.short_context_length
        adapter = Path(first_model) / "adapter_config.json"
        if adapter.is_file() and not (adapter.parent / "config.json").is_file():  # PEFT saves no other one
            first_model = json.loads(adapter.read_text())["base_model_name_or_path"]
        config = load_pretrained(AutoConfig, "model", first_model).get_text_config(decoder=True)
        rope = getattr(config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        return automatic_length(original)

    def perplexity(self, short_length: int) -> PerplexitySpec | None:
        """Return the text and the lengths to measure perplexity at, or None without any.

        Args:
            short_length: of the short-context check; 0: no check.
        """
        _, tasks = split_tasks(self.tasks)
        lengths = {short_length} - {0}
        if "perplexity" in tasks:
            lengths |= set(self.lengths)
        if "perplexity_by_position" in tasks:
            lengths |= {max(self.lengths)}
        return PerplexitySpec(tuple(sorted(lengths)), self.stride, self.perplexity_tokens) if lengths else None

    def heldout_source(self) -> SourceArguments:
        """Return the source of the text for perplexity."""
        return SourceArguments(data=self.text, heldout_data=self.heldout_data)
