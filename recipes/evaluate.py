"""Measure retrieval by length and depth and perplexity by length and position, for one model or several side by side.

    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml recipes/evaluate.py \\
        --models before=<hub id or folder> after=runs/books --tasks needle multi_needle perplexity \\
        --lengths 1024 2048 4096

The processes share each sequence: for retrieval, every one keeps a part of the KV cache, and perplexity is computed as
in training, so contexts that do not fit one GPU are measured where they were trained. An interrupted run continues
where it stopped. Writes files of all answers and losses for each model, tables, numbers and plots to output_dir, and
prints the tables.

Tasks: needle and multi_needle (the protocol of LWM), key_value, lines; of RULER multi_key, multi_value, multi_query,
variable_tracking, common_words, frequent_words; perplexity, perplexity_by_position. Beside every run, short_context
compares perplexity at a short length with that of the first model. docs/evaluation.md says what each measures and what
it does not.
"""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from arguments import parse
from evaluation_arguments import EvaluationArguments
from evaluation_reports import Measurements, write_reports
from refusals import run
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import ring_hf
from ring_hf.data import load_documents
from ring_hf.data.sequences import load_splits, tokenize_heldout
from ring_hf.evaluation import evaluation_windows
from ring_hf.evaluation.haystack import Filler
from ring_hf.evaluation.retrieval_grid import Generate, GridResult, GridSpec, read_grid, run_grid
from ring_hf.evaluation.sliding_perplexity import (
    PerplexityResult,
    PerplexitySpec,
    measure_perplexity,
    read_perplexity,
)
from ring_hf.evaluation.token_losses import TokenLosses
from ring_hf.hf.pretrained import load_pretrained

FILLER_CHARACTERS = 8_000_000  # about two million tokens: more is read in a circle


def main() -> None:
    (args,) = parse((EvaluationArguments,), description=str(__doc__))
    models = args.named_models()
    grid = args.grid()
    short_length = args.short_length(next(iter(models.values())))
    perplexity = args.perplexity(short_length)
    accelerator = start_processes(args.context_parallel_size)
    measurements = Measurements(short_length)
    for name, source in models.items():
        measured = ModelRun(args, accelerator, name, source)
        if grid is not None:
            measurements.retrieval[name] = measured.answer(grid)
        if perplexity is not None:
            measurements.perplexity[name] = measured.predict(perplexity)
        measured.free()
    if accelerator.is_main_process:
        write_reports(args, measurements)
    accelerator.wait_for_everyone()


def start_processes(context_parallel_size: int | None) -> Accelerator:
    """Set up the processes of this launch, which share every sequence.

    Raises:
        ValueError: if some of them would repeat what others do.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    size = num_processes if context_parallel_size is None else context_parallel_size
    if size != num_processes:
        raise ValueError(
            f"context_parallel_size={size}, but {num_processes} processes have been launched. Launch {size}: the "
            "others would measure the same examples again."
        )
    config = ring_hf.ContextParallelConfig(context_parallel_size=size)
    return Accelerator(parallelism_config=config, cpu=not torch.accelerator.is_available())


class ModelRun:
    """Measures one model, which is loaded when something is left to measure.

    Args:
        name: of its files in output_dir.
        source: folder or hub id.
    """

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator, name: str, source: str) -> None:
        self._args, self._accelerator, self._name, self._source = args, accelerator, name, source
        self._model: Any = None
        self._tokenizer: Any = None

    def answer(self, spec: GridSpec) -> GridResult:
        """Return the scores of all prompts, those of an interrupted run included."""
        path = Path(self._args.output_dir) / f"{self._name}.jsonl"
        done: GridResult = self._read(lambda: read_grid(path, spec, {**self._origin(), "text": self._args.text}))
        total = len(list(spec.cells()))
        if len(done.scores) == total:
            return done
        self._load()
        with self._bar(total, len(done.scores), "prompts") as bar:
            return run_grid(
                spec,
                generator_of(self._model, self._tokenizer, self._args.prefill_chunk_size),
                Filler(read_text(self._args.text), self._tokenizer),
                path,
                done=done,
                writes=self._accelerator.is_main_process,
                report_progress=lambda num_done, _: bar.update(num_done - bar.n),
            )

    def predict(self, spec: PerplexitySpec) -> PerplexityResult:
        """Return the losses of all excerpts of the text, those of an interrupted run included."""
        path = Path(self._args.output_dir) / f"{self._name}.perplexity.jsonl"
        text = self._args.heldout_data or f"held out of {self._args.text}"
        done: PerplexityResult = self._read(lambda: read_perplexity(path, spec, {**self._origin(), "text": text}))
        if done.is_complete:
            return done
        self._load()
        with self._accelerator.main_process_first():  # the others read the tokens from the cache of `datasets`
            documents = tokenize_heldout(load_splits(self._args.heldout_source())[1], self._tokenizer)
        assert documents is not None  # a tenth is held out
        excerpts_NS = evaluation_windows(documents["input_ids"], spec.lengths[-1], spec.num_excerpts)
        predicted = excerpts_NS.shape[1] - 1  # the first token of an excerpt is not
        total = len(excerpts_NS) * len(spec.lengths) * predicted
        with self._bar(total, len(done.losses) * predicted, "tokens") as bar:
            return measure_perplexity(
                excerpts_NS,
                TokenLosses(self._model),
                path,
                done=done,
                writes=self._accelerator.is_main_process,
                tokens_per_batch=self._args.tokens_per_batch,
                report_progress=bar.update,
            )

    def free(self) -> None:
        """Free the model, before the next one is loaded."""
        self._model = None
        gc.collect()

    def _load(self) -> None:
        if self._model is None:
            self._tokenizer = load_pretrained(AutoTokenizer, "tokenizer", self._source)
            options = {"attn_implementation": self._args.attn_implementation, "dtype": self._args.dtype}
            model = load_pretrained(AutoModelForCausalLM, "model", self._source, **options)
            model.generation_config.use_cache = True  # a model may have been saved without, as for training
            self._model = model.to(self._accelerator.device).eval()

    def _read(self, read: Any) -> Any:
        """Return what the first process reads, on all of them: another machine may not have the file."""
        box: list[Any] = [result_or_error(read) if self._accelerator.is_main_process else None]
        broadcast_object_list(box)
        if isinstance(box[0], ValueError):
            raise ValueError(str(box[0]))
        return box[0]

    def _origin(self) -> dict[str, str]:
        return {"model": self._source, "dtype": self._args.dtype, "attention": self._args.attn_implementation}

    def _bar(self, total: int, initial: int, unit: str) -> Any:
        disabled = not self._accelerator.is_main_process
        return tqdm(total=total, initial=initial, desc=self._name, unit=f" {unit}", disable=disabled)


def result_or_error(read: Any) -> Any:
    """Return the result of a function, or the error that all processes raise."""
    try:
        return read()
    except ValueError as error:
        return error


def read_text(source: str) -> str:
    """Return enough text of a source for all prompts."""
    parts, num_characters = [], 0
    for row in load_documents(source):
        parts.append(row["text"])
        num_characters += len(parts[-1])
        if num_characters >= FILLER_CHARACTERS:
            break
    return "\n\n".join(parts)


def generator_of(model: Any, tokenizer: Any, prefill_chunk_size: int | None) -> Generate:
    """Return a function that generates greedily after a prompt, over a cache that all processes share."""

    @torch.no_grad()
    def generate(prompt: str, max_new_tokens: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        output = model.generate(
            **inputs,
            past_key_values=ring_hf.ContextParallelCache(model),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            prefill_chunk_size=prefill_chunk_size,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return generate


if __name__ == "__main__":
    run(main)
