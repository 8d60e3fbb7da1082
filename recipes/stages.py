"""The stages of a YAML file: defaults and overrides resolved to one complete run for each.

Keys at the top level are those of the recipe (`recipes/finetune.py --help`) and the defaults of all stages; each
mapping under `stages` overrides them. Keys of stages that no recipe has are `STAGE_KEYS`.
"""

import dataclasses
import importlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from arguments import MemoryArguments, ModelArguments, ParallelArguments, explain_unknown, parse
from budget import Batch, count_replicas, count_steps, make_batch
from launch_line import LaunchLine, read_launch
from model_card import read_perplexity
from rope import resolve_rope, warn_about_theta
from transformers import AutoConfig

from ring_hf.data.run_options import read_yaml
from ring_hf.hf import last_checkpoint
from ring_hf.hf.pretrained import load_pretrained
from ring_hf.text import parse_size

# Keys of a stage (or, as a default, of the top level) that are not those of the recipe.
STAGE_KEYS = {
    "name": "Name of the stage; its folder is stage-01-NAME. Default: its length.",
    "launch": "Command that starts the processes, as `accelerate launch --config_file FILE`.",
    "num_processes": "On all machines, where the launch line does not say it.",
    "recipe": "Script in recipes/ that runs the stage: finetune (default) or sft.",
    "budget": "{tokens: 4.8B} (decimal) or {steps: 1200}.",
    "rope": "RoPE of the stage, relative to the base model's (see recipes/rope.py).",
    "optimizer_state": "fresh (default), or keep: that of the last stage.",
    "until_short_perplexity_within": "Share by which perplexity at the shortest of perplexity_lengths may exceed that "
    "of the base model; once it does not, the stage ends.",
}
TOP_KEYS = {
    "stages": "List of mappings, one for each stage.",
    "plan_model": "Name, folder or mapping of a config.json that ring-hf plan knows, for --plan. Default: model.",
    "measure_launch": "Launch line of the measurement before the first stage. Default: that of the first stage.",
}
# Keys of the recipe that follow from keys of the stage.
REPLACED = {"rope_theta": "rope", "rope_parameters": "rope", "max_steps": "budget", "max_tokens": "budget"}
REPLACED |= {"num_train_epochs": "budget", "optimizer_from": "optimizer_state", "card_notes": "the driver"}
REPLACED |= {"verify_only": "the driver"}
REPLACED |= {"until_perplexity": "until_short_perplexity_within", "evaluate_only": "the driver"}
_PRECISION = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")  # checked on the devices of the run


@dataclass(frozen=True)
class Stage:
    """One stage, resolved.

    Attributes:
        index: from 1; 0 is the measurement before the first stage.
        values: the complete run, as written to run.yaml; `until_perplexity` is added when the base was measured.
        margin: of `until_short_perplexity_within`.
        rope: complete parameters, None if they are those of the last stage.
        warnings: of the plan.
    """

    index: int
    name: str
    recipe: str
    launch: LaunchLine
    values: dict[str, Any]
    batch: Batch
    num_steps: int
    margin: float | None = None
    rope: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.values["output_dir"])

    @property
    def title(self) -> str:
        return f"stage {self.index} ({self.name})"

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.batch.num_tokens


def recipe_types(recipe: str) -> tuple[Any, ...]:
    """Return the dataclasses of a recipe's arguments.

    Raises:
        ValueError: if there is no such recipe.
    """
    folder = Path(__file__).resolve().parent
    module = importlib.import_module(recipe) if (folder / f"{recipe}.py").is_file() else None
    if not hasattr(module, "ARGUMENTS"):
        names = [path.stem for path in folder.glob("*.py") if "\nARGUMENTS = " in path.read_text()]
        raise ValueError(f"recipe={recipe!r} is no training recipe. Choose one of {', '.join(sorted(names))}.")
    return tuple(module.ARGUMENTS)  # type: ignore[union-attr]


def recipe_keys(recipe: str) -> set[str]:
    return {field.name for kind in recipe_types(recipe) for field in dataclasses.fields(kind) if field.init}


def read_stages(path: str, overrides: dict[str, Any]) -> tuple[list[Stage], dict[str, Any]]:
    """Read a file and resolve its stages.

    Args:
        overrides: top-level values of the command line.

    Returns:
        The stages, and the top-level values.

    Raises:
        ValueError: if a key or value is wrong, with the stage it is in.
    """
    top = read_yaml(path, Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(top, dict) or not isinstance(top.get("stages"), list) or not top["stages"]:
        raise ValueError(f"{path} has no list of stages. Write `stages:` with one mapping for each.")
    top |= overrides
    defaults = {key: value for key, value in top.items() if key not in TOP_KEYS}
    base = base_config(defaults | top["stages"][0])
    stages: list[Stage] = []
    for index, own in enumerate(top["stages"], 1):
        if not isinstance(own, dict):
            raise ValueError(f"{path}: stage {index} is {own!r}, not a mapping of keys to values.")
        try:
            stages.append(resolve_stage(index, {**defaults, **own}, stages, base))
        except ValueError as error:
            raise ValueError(f"{path}, stage {index} ({own.get('name', 'without a name')}): {error}") from error
    return stages, top


def base_config(values: dict[str, Any]) -> Any:
    """Return the configuration of the model that the first stage starts from."""
    kinds = {field.name for field in dataclasses.fields(ModelArguments)}
    args = ModelArguments(**{key: value for key, value in values.items() if key in kinds and "rope" not in key})
    if args.model is None:
        assert isinstance(args.model_config, dict)
        return AutoConfig.for_model(**args.model_config).get_text_config()
    return load_pretrained(AutoConfig, "model", args.model, revision=args.model_revision).get_text_config()


def resolve_stage(index: int, given: dict[str, Any], earlier: list[Stage], base: Any) -> Stage:
    """Resolve one stage.

    Args:
        index (`int`): from 1.
        given: defaults and the stage's own values.
        earlier: the stages before it.
        base: configuration of the base model.

    Raises:
        ValueError: if a key or value is wrong.
    """
    recipe = str(given.get("recipe", "finetune"))
    keys = recipe_keys(recipe)
    if unknown := sorted(set(given) - keys - set(STAGE_KEYS)):
        raise ValueError(explain_unknown("a stage", unknown, keys | set(STAGE_KEYS)))
    if replaced := sorted(set(given) & set(REPLACED)):
        raise ValueError(f"{replaced[0]} follows from {REPLACED[replaced[0]]}. Leave it out.")
    values = {key: value for key, value in given.items() if key not in STAGE_KEYS}
    max_length = values["max_length"] = parse_size(str(values.get("max_length", "2K")))
    if "perplexity_lengths" in values:
        values["perplexity_lengths"] = [parse_size(str(length)) for length in values["perplexity_lengths"]]
    name = str(given.get("name", max_length))
    if not re.fullmatch(r"[\w.-]+", name) or name in {stage.name for stage in earlier}:
        raise ValueError(f"name={name!r} must be letters, digits, `_`, `.` or `-`, and unlike those before it.")
    rope = None if "rope" not in given else resolve_rope(base, given["rope"], max_length)
    if rope is not None:
        values["rope_parameters"] = rope
    values |= _start(index, given, earlier)
    folder = Path(values.get("output_dir", "runs/extend")) / f"stage-{index:02}-{name}"
    values |= {"output_dir": str(folder), "card_notes": str(folder / "notes.md")}
    values.setdefault("disable_tqdm", True)  # one bar shows all stages
    launch = read_launch(str(given.get("launch", "python")), given.get("num_processes"))
    batch, num_steps = _resolve_budget(values, given, launch)
    values["tokens_per_batch"], values["max_steps"] = str(batch.num_tokens), num_steps
    values.pop("gradient_accumulation_steps", None)
    margin = given.get("until_short_perplexity_within")
    if margin is not None and not (values.get("perplexity_lengths") and values.get("eval_strategy") == "steps"):
        raise ValueError(
            f"until_short_perplexity_within={margin} is measured at the shortest of perplexity_lengths, at every "
            f"evaluation; they are {values.get('perplexity_lengths')}, with eval_strategy="
            f"{values.get('eval_strategy', 'no')}. Set perplexity_lengths, eval_strategy: steps and eval_steps."
        )
    check_values(recipe, values)
    warning = warn_about_theta(rope if rope is not None else _last_rope(earlier, base), max_length)
    warnings = () if warning is None else (warning,)
    return Stage(index, name, recipe, launch, values, batch, num_steps, margin, rope, warnings)


def _last_rope(earlier: list[Stage], base: Any) -> dict[str, Any]:
    ropes = [stage.rope for stage in earlier if stage.rope is not None]
    return ropes[-1] if ropes else getattr(base, "rope_parameters", None) or {}


def _start(index: int, given: dict[str, Any], earlier: list[Stage]) -> dict[str, Any]:
    """Return the model that a stage starts from, and the checkpoint of the optimizer state that it keeps."""
    state = given.get("optimizer_state", "fresh")
    if state not in ("fresh", "keep"):
        raise ValueError(f"optimizer_state={state!r} must be fresh or keep.")
    if not earlier:
        if state == "keep":
            raise ValueError("optimizer_state=keep needs a stage before it. The first one starts with a fresh one.")
        return {}
    last = earlier[-1]
    start: dict[str, Any] = {"model": str(last.folder), "model_config": None, "model_revision": "main"}
    if state == "keep":
        _check_kept(last, given)
        start["optimizer_from"] = "last"  # the folder is known when the last stage has ended
    return start


def _check_kept(last: Stage, given: dict[str, Any]) -> None:
    """Raise if the optimizer state of the last stage is not saved, or another engine saved it."""
    if last.values.get("save_strategy", "steps") in ("no", False) or last.values.get("save_only_model"):
        settings = {key: last.values[key] for key in ("save_strategy", "save_only_model") if key in last.values}
        raise ValueError(
            f"optimizer_state=keep needs the checkpoints of stage {last.index}, which {settings} keep from having an "
            "optimizer state. Set save_strategy: steps there, and save_only_model: false."
        )
    if last.values.get("load_best_model_at_end"):
        raise ValueError(
            f"optimizer_state=keep: with load_best_model_at_end, stage {last.index} may end with the weights of an "
            "earlier step than its optimizer state. Leave it out there, or use optimizer_state: fresh."
        )
    launch = read_launch(str(given.get("launch", "python")), given.get("num_processes"))
    if launch.engine != last.launch.engine:
        raise ValueError(
            f"optimizer_state=keep: stage {last.index} runs on {last.launch.engine}, this one on {launch.engine}, and "
            "their states have other formats. Use one engine for both, or optimizer_state: fresh."
        )
    if launch.engine == "DEEPSPEED" and launch.num_processes != last.launch.num_processes:
        raise ValueError(
            f"optimizer_state=keep: DeepSpeed saves a shard for each of {last.launch.num_processes} processes, and "
            f"this stage has {launch.num_processes}. Start as many, or use optimizer_state: fresh."
        )


def _resolve_budget(values: dict[str, Any], given: dict[str, Any], launch: LaunchLine) -> tuple[Batch, int]:
    budget = given.get("budget")
    if not isinstance(budget, dict) or set(budget) not in ({"tokens"}, {"steps"}):
        raise ValueError(f"budget={budget!r} must be {{tokens: 4.8B}} or {{steps: 1200}}.")
    parallel = {field.name for field in dataclasses.fields(ParallelArguments)}
    config = ParallelArguments(**{key: value for key, value in values.items() if key in parallel}).config()
    replicas = count_replicas(launch.num_processes, config.context_parallel_size or 1)
    rows = int(values.get("per_device_train_batch_size", 8))  # the Trainer's default
    accumulation = int(values.get("gradient_accumulation_steps", 1))
    if "tokens_per_batch" in values and accumulation != 1:
        raise ValueError("tokens_per_batch sets gradient_accumulation_steps. Give one of them.")
    batch = make_batch(values.get("tokens_per_batch"), int(values["max_length"]), rows, replicas, accumulation)
    if "tokens" in budget:
        return batch, count_steps(budget["tokens"], batch)
    if not isinstance(budget["steps"], int) or budget["steps"] < 1:
        raise ValueError(f"budget={budget}: steps must be a whole number of at least 1.")
    return batch, budget["steps"]


def check_values(recipe: str, values: dict[str, Any]) -> None:
    """Check the values of a run as its recipe would, without touching a device.

    Raises:
        ValueError: if one is not allowed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        checked = {key: value for key, value in values.items() if key not in _PRECISION}
        path.write_text(yaml.safe_dump(checked))
        arguments = parse(recipe_types(recipe), "", [str(path)], use_cpu=True)
    for group in arguments:
        if isinstance(group, ParallelArguments | MemoryArguments):
            group.config()
    check = getattr(importlib.import_module(recipe), "check_arguments", None)
    if check is not None:
        check(arguments)


def measurement(stages: list[Stage], top: dict[str, Any]) -> Stage | None:
    """Return the run that measures the base model before the first stage, None if nothing is to be measured."""
    first = stages[0]
    if not first.values.get("perplexity_lengths"):
        return None
    dropped = {"rope_parameters", "tokens_per_batch", "max_steps", "eval_strategy", "report_to", "push_to_hub"}
    dropped |= {"verify_steps", "verify_length"}
    values = {key: value for key, value in first.values.items() if key not in dropped}
    values |= {"evaluate_only": True, "report_to": "none", "output_dir": str(first.folder.parent / "stage-00-base")}
    launch = read_launch(str(top["measure_launch"])) if "measure_launch" in top else first.launch
    return Stage(0, "base", first.recipe, launch, values, first.batch, 0)


def with_measured_values(stage: Stage, stages: list[Stage], base: Stage | None) -> Stage:
    """Return a stage with the values that follow from what ran before: its limit of perplexity, its optimizer state.

    Raises:
        ValueError: if the last stage has no checkpoint.
    """
    values = dict(stage.values)
    if stage.margin is not None:
        assert base is not None
        measured = min(read_perplexity(base.folder), key=lambda row: row["length"])
        values["until_perplexity"] = (1 + stage.margin) * measured["perplexity"]
    if values.get("optimizer_from") == "last":
        folder = stages[stage.index - 2].folder
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(
                f"{stage.title}: optimizer_state=keep, but {folder} has no complete checkpoint. Use fresh, or remove "
                "the folder to train that stage again."
            )
        values["optimizer_from"] = str(checkpoint)
    return dataclasses.replace(stage, values=values)
