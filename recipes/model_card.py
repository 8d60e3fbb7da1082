"""The model card of a run: README.md beside the model, with base model, data, recipe, curves and how exact it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from arguments import DataArguments
from run_log import LOG, read_rows
from run_plots import plot_run
from transformers import Trainer, TrainingArguments

import ring_hf

PICTURE = "training.png"
LIBRARY = "ring_hf"
EXACTNESS = """\
Sequences were shared by {size} processes ({replicas} data-parallel) with the library ring_hf {version}. Attention is
not approximated, labels are shifted before a sequence is sharded, and the loss is the mean over all target tokens:
loss, gradients, grad norm and evaluation losses are those of one process that holds whole sequences, up to rounding.
Before every forward pass, the processes compared their batches; after every backward pass, they compared the loss that
was trained with the one that the model returned. Settings that would train with other numbers are refused. The model
itself has no code of the library: plain Transformers loads it."""
# Keys that say where a run is and how it is logged, not what it trains.
_NOT_RECIPE = {"output_dir", "logging_dir", "report_to", "run_name", "parallelism_config", "use_cpu", "card_notes"}
_NOT_RECIPE |= {"accelerator_config", "disable_tqdm", "debug", "dataloader_pin_memory", "ddp_find_unused_parameters"}


def describe_recipe(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the keys of a run whose values differ from the defaults, without tokens of accounts."""
    recipe: dict[str, Any] = {}
    for values in arguments:
        defaults = {field.name: _default(field) for field in dataclasses.fields(values)}
        given = values.to_dict() if isinstance(values, TrainingArguments) else dataclasses.asdict(values)
        recipe |= {key: value for key, value in given.items() if (value or None) != (defaults.get(key) or None)}
    return {key: value for key, value in recipe.items() if key not in _NOT_RECIPE and not key.endswith("token")}


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def install_model_card(trainer: Trainer, arguments: tuple[Any, ...]) -> None:
    """Have a Trainer write this card wherever it would write its own, also when it pushes to the hub."""
    recipe = describe_recipe(arguments)
    notes = next((values.card_notes for values in arguments if hasattr(values, "card_notes")), None)

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        if trainer.is_world_process_zero():
            write_card(trainer, recipe, notes)

    trainer.create_model_card = create_model_card


def write_card(trainer: Trainer, recipe: dict[str, Any], notes: str | None) -> None:
    """Write README.md and the picture of a run to its output_dir."""
    folder = Path(str(trainer.args.output_dir))
    rows = read_rows(folder / LOG)
    perplexities = read_perplexity(folder)
    plot_run(rows, perplexities, folder / PICTURE)
    (folder / "README.md").write_text(format_card(trainer, recipe, perplexities, notes))


def read_perplexity(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's perplexity.json, none if it measured nothing."""
    path = folder / "perplexity.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def format_card(
    trainer: Trainer, recipe: dict[str, Any], perplexities: list[dict[str, Any]], notes: str | None
) -> str:
    """Return the Markdown of a card.

    Args:
        recipe: the result of `describe_recipe`.
        perplexities: the rows of perplexity.json.
        notes: a Markdown file that becomes a part of it.
    """
    config, args = trainer.model.config.get_text_config(), trainer.args
    base = recipe.get("model")
    name = (args.hub_model_id or Path(str(args.output_dir)).name).split("/")[-1]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = [LIBRARY, "long-context", "context-parallelism"]
    if base is not None and not Path(base).exists():
        head["base_model"] = base
    size = args.parallelism_config.context_parallel_size
    exactness = EXACTNESS.format(size=size, replicas=args.world_size // size, version=ring_hf.__version__)
    length = recipe.get("max_length", "the default")
    sections = [
        f"# {name}",
        f"{'A new model' if base is None else f'`{base}`'}, trained at a context length of {length} tokens. The "
        f"configuration allows {config.max_position_embeddings:,} positions.",
        "## Data\n\n" + _block({key: value for key, value in recipe.items() if key in _DATA} or {"data": "builtin"}),
        "## RoPE\n\n" + _block({"rope_parameters": getattr(config, "rope_parameters", None)}),
        "## Recipe\n\n" + _block({key: value for key, value in recipe.items() if key not in _DATA}),
        f"## Curves\n\n![loss over tokens and perplexity by context length]({PICTURE})",
    ]
    if perplexities:
        table = ["| context length | perplexity | tokens |", "|---:|---:|---:|"]
        table += [f"| {row['length']:,} | {row['perplexity']:.3f} | {row['num_tokens']:,} |" for row in perplexities]
        sections.append("## Held-out perplexity\n\n" + "\n".join(table))
    if notes is not None:
        sections.append(Path(notes).read_text().strip())
    sections.append(f"## Exactness\n\n{exactness}")
    return f"---\n{yaml.safe_dump(head)}---\n\n" + "\n\n".join(sections) + "\n"


_DATA = {field.name for field in dataclasses.fields(DataArguments)} - {"max_length", "num_proc"}


def _block(values: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False)}```"
