"""Measure held-out perplexity by context length, in one process, for one model or several side by side.

    python recipes/perplexity.py --models before=<hub id or folder> after=runs/books --data "books/*.txt" \\
        --lengths 512 1024 2048 4096

Writes perplexity.json, perplexity.md and perplexity.png to output_dir and prints the table. Every model is measured
on the same text, cut into windows of each length; models must therefore share a tokenizer to be compared.
"""

import json
from pathlib import Path

import torch
from arguments import PerplexityArguments, SourceArguments, parse
from refusals import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from ring_hf.data.sequences import load_splits, tokenize_heldout
from ring_hf.evaluation import (
    LengthResult,
    evaluation_windows,
    format_positions,
    format_table,
    perplexity_by_length,
    plot_perplexity,
)
from ring_hf.hf.pretrained import load_pretrained


def main() -> None:
    args, source_args = parse((PerplexityArguments, SourceArguments), description=str(__doc__))
    if not args.models:
        raise ValueError("models is empty: nothing to measure. Give --models name=folder, once or several times.")
    if source_args.holds_nothing_out:
        raise ValueError(
            f"heldout_fraction={source_args.heldout_fraction} holds nothing out, so there is nothing to measure on. "
            "Hold out what training held out, or name a source of its own as heldout_data."
        )
    measured: dict[str, list[LengthResult]] = {}
    for spec in args.models:
        name, separator, source = spec.partition("=")
        name, source = (name, source) if separator else (Path(spec).name, spec)
        measured[name] = measure(args, source_args, name, source)
    write(args, measured)


def measure(args: PerplexityArguments, source_args: SourceArguments, name: str, source: str) -> list[LengthResult]:
    """Return the results of one model: measured now, or read from the perplexity.json of an earlier run."""
    if source.endswith(".json"):
        return read_results(source, name)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer", source)
    model = load_pretrained(AutoModelForCausalLM, "model", source, attn_implementation=args.attention).to(device)
    tokens = tokenize_heldout(load_splits(source_args)[1], tokenizer)
    assert tokens is not None  # something is held out
    windows_NS = evaluation_windows(tokens["input_ids"], max(args.lengths), args.max_windows)
    return perplexity_by_length(model, windows_NS, args.lengths, args.tokens_per_batch, progress=f"measuring {name}")


def read_results(path: str, name: str) -> list[LengthResult]:
    """Return the results of one model in the perplexity.json of an earlier run.

    Raises:
        ValueError: if there is no such file, or the model is not in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"models: {name}={path} is no file here. Name the perplexity.json of an earlier measurement.")
    results = json.loads(Path(path).read_text())["results"]
    if name not in results:
        raise ValueError(f"models: {path} has no results of {name!r}, only of {', '.join(map(repr, results))}.")
    return [
        LengthResult(row["length"], row["num_tokens"], row["loss"], tuple(row["position_losses"]))
        for row in results[name]
    ]


def write(args: PerplexityArguments, measured: dict[str, list[LengthResult]]) -> None:
    """Print the table; write numbers, table and plot to output_dir."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table, positions = format_table(measured), format_positions(measured)
    results = {name: [row.to_dict() for row in rows] for name, rows in measured.items()}
    (folder / "perplexity.json").write_text(json.dumps({"results": results}, indent=1) + "\n")
    (folder / "perplexity.md").write_text(f"{table}\n\n{positions}\n")
    trained = dict(zip(measured, args.trained_lengths, strict=False))
    plot_perplexity(measured, folder / "perplexity.png", args.title, trained)
    print(f"\n{table}\n\n{positions}\n\nplot: {folder / 'perplexity.png'}")


if __name__ == "__main__":
    run(main)
