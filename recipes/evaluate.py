"""Measure retrieval over long contexts, by length and depth, for one model or several side by side.

    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml recipes/evaluate.py \\
        --models before=<hub id or folder> after=runs/books --tasks needle multi_needle --lengths 1024 2048 4096

The processes share each prompt: every one keeps a part of the KV cache, so contexts that do not fit one GPU are
measured where they were trained. An interrupted run continues where it stopped. Writes a file of all answers for each
model, retrieval.json, retrieval.md and retrieval.png to output_dir, and prints the table.

Tasks: needle and multi_needle (the protocol of LWM), key_value, lines; of RULER multi_key, multi_value, multi_query,
variable_tracking, common_words, frequent_words. docs/evaluation.md says what each measures and what it does not.
"""

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from arguments import option, parse
from refusals import run
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import ring_hf
from ring_hf.data import load_documents
from ring_hf.evaluation.grid_charts import plot_grids
from ring_hf.evaluation.haystack import Filler
from ring_hf.evaluation.retrieval_grid import (
    Generate,
    GridResult,
    GridSpec,
    format_scores,
    read_grid,
    run_grid,
    scores_by_length,
)
from ring_hf.hf.pretrained import load_pretrained
from ring_hf.text import markdown_table

FILLER_CHARACTERS = 8_000_000  # about two million tokens: more is read in a circle


@dataclass
class EvaluationArguments:
    """The models, the grid, and how a prompt is shared."""

    models: list[str] = option([], "Each `name=folder or hub id`.")
    tasks: list[str] = option(["needle"], "Names of tasks; see above.")
    lengths: list[int] = option([1024, 2048, 4096], "Tokens of the prompts.")
    num_depths: int = option(10, "Depths at which the fact that is asked for is hidden, at equal distances.")
    rounds: int = option(3, "Examples for each length and depth.")
    seed: int = option(0, "Of all examples.")
    text: str = option("builtin", "Source of the filler text: files, a dataset of the hub, or `builtin`.")
    context_parallel_size: int | None = option(
        None, "Processes that share a prompt. Default: all; other processes would repeat the same."
    )
    attn_implementation: str = option("ring_zigzag", "A backend of ring_hf.")
    dtype: str = option("auto", "Type of the weights and the KV cache; `auto` is that of the files.")
    prefill_chunk_size: int | None = option(None, "Tokens of a prompt at a time, to save memory. Default: all.")
    output_dir: str = option("runs/retrieval", "Folder of the results.")


def main() -> None:
    (args,) = parse((EvaluationArguments,), description=str(__doc__))
    if not args.models:
        raise ValueError("models is empty: nothing to measure. Give --models name=folder, once or several times.")
    spec = GridSpec(tuple(args.tasks), tuple(args.lengths), args.num_depths, args.rounds, args.seed)
    models = named_models(args.models)
    accelerator = start_processes(args.context_parallel_size)
    text = read_text(args.text)
    results = {name: measure(args, spec, accelerator, text, name, source) for name, source in models.items()}
    if accelerator.is_main_process:
        write(args, results)
    accelerator.wait_for_everyone()


def named_models(entries: list[str]) -> dict[str, str]:
    """Return the folder or hub id of each model by its name.

    Raises:
        ValueError: if two models have one name, and would share a file of results.
    """
    sources: dict[str, str] = {}
    for entry in entries:
        name, separator, source = entry.partition("=")
        name, source = (name, source) if separator else (Path(entry).name, entry)
        if name in sources:
            raise ValueError(
                f"models: {sources[name]} and {source} are both named {name!r}. Write name=folder for each."
            )
        sources[name] = source
    return sources


def start_processes(context_parallel_size: int | None) -> Accelerator:
    """Set up the processes of this launch, which share every prompt.

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


def read_text(source: str) -> str:
    """Return enough text of a source for all prompts."""
    parts, num_characters = [], 0
    for row in load_documents(source):
        parts.append(row["text"])
        num_characters += len(parts[-1])
        if num_characters >= FILLER_CHARACTERS:
            break
    return "\n\n".join(parts)


def measure(
    args: EvaluationArguments, spec: GridSpec, accelerator: Accelerator, text: str, name: str, source: str
) -> GridResult:
    """Return the scores of one model, those of an interrupted run included."""
    path = Path(args.output_dir) / f"{name}.jsonl"
    # The first process reads, since another machine may not have the file.
    origin = {"model": source, "text": args.text, "dtype": args.dtype, "attention": args.attn_implementation}
    box: list[Any] = [read_or_error(path, spec, origin) if accelerator.is_main_process else None]
    broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise ValueError(str(box[0]))
    done: GridResult = box[0]
    if len(done.scores) == len(list(spec.cells())):
        return done
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer", source)
    options = {"attn_implementation": args.attn_implementation, "dtype": args.dtype}
    model = load_pretrained(AutoModelForCausalLM, "model", source, **options).to(accelerator.device).eval()
    total = len(list(spec.cells()))
    bar = tqdm(total=total, initial=len(done.scores), desc=name, disable=not accelerator.is_main_process)
    result = run_grid(
        spec,
        generator_of(model, tokenizer, args.prefill_chunk_size),
        Filler(text, tokenizer),
        path,
        done=done,
        writes=accelerator.is_main_process,
        report_progress=lambda num_done, _: bar.update(num_done - bar.n),
    )
    bar.close()
    del model
    gc.collect()
    return result


def read_or_error(path: Path, spec: GridSpec, origin: dict[str, str]) -> GridResult | ValueError:
    """Return the scores of a file, or the error that all processes raise."""
    try:
        return read_grid(path, spec, origin)
    except ValueError as error:
        return error


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


def write(args: EvaluationArguments, results: dict[str, GridResult]) -> None:
    """Print the table; write it, the numbers and the heat maps to output_dir."""
    folder = Path(args.output_dir)
    lengths = sorted(args.lengths)
    table = markdown_table(format_scores(results, lengths))
    numbers = {name: scores_by_length(result) for name, result in results.items()}
    (folder / "retrieval.json").write_text(json.dumps({"scores": numbers, "rounds": args.rounds}, indent=1) + "\n")
    (folder / "retrieval.md").write_text(f"Score in percent by tokens of the prompt.\n\n{table}\n")
    plot_grids(results, folder / "retrieval.png")
    print(f"\n{table}\n\nheat maps: {folder / 'retrieval.png'}")


if __name__ == "__main__":
    run(main)
