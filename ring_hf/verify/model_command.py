"""`ring-hf verify --model`: the user's own model and data, on shards and in one process.

The command starts the ranks with `accelerate launch`, as training does, and prints the report of rank 0. With
`--config`, the ranks are those of a recipe: the run of the file, with everything it sets.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ..launcher import accelerate_command
from ..text import parse_size

ROOT = Path(__file__).resolve().parents[2]  # of a checkout; an installed package has no recipes beside it
ENGINES = ("ddp", "fsdp2", "zero3")
RECIPES = ("finetune", "sft")
GRACE = 35.0  # seconds to end after a signal; torchrun gives its ranks 30
NUM_LINES = 40  # of the output of ranks that failed
DEFAULTS = {"attn": "ring_zigzag", "length": 512, "dtype": "float32", "rows": 2}
DESCRIPTION = """
With --model or --config, it verifies a model instead of the machine: one batch of your own data goes through one
process and through the ranks that share each sequence. Loss, logits by position, the gradient of every parameter and
the grad norm must agree within rounding, which depends on the dtype (float32 unless --dtype says otherwise). If they
do not, the report names the first module, tensor and tokens that differ, and what usually causes that."""
EXAMPLES = """
  your own model and text, four processes that share each row
    ring-hf verify --model path/to/model --cp 4 --data "books/*.txt" --length 4K
  random tokens, another layout and ZeRO-3
    ring-hf verify --model path/to/model --cp 2 --attn ring_striped --engine zero3
  a model that ring_hf refuses: where would it differ?
    ring-hf verify --model path/to/model --cp 2 --past-refusals
  everything that a run sets, before it starts
    ring-hf verify --config configs/finetune.yaml --cp 2 --model path/to/model
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model's verification to the parser of `ring-hf verify`."""
    group = parser.add_argument_group("a model of your own, instead of the machine")
    group.add_argument("--model", help="folder or hub id of a causal language model")
    group.add_argument("--config", type=Path, help="YAML file of a run; the options below replace its values")
    group.add_argument("--recipe", choices=RECIPES, default="finetune", help="recipe of the run (default: finetune)")
    group.add_argument("--cp", type=int, help="processes that share each row (default: one per GPU, 2 on a CPU)")
    group.add_argument("--attn", help="attention backend (default: ring_zigzag)")
    group.add_argument("--engine", choices=ENGINES, default="ddp", help="engine of training (default: ddp)")
    group.add_argument("--data", nargs="+", help="text files, globs or a hub dataset (default: random tokens)")
    group.add_argument("--tokenizer", help="hub id, folder or `bytes` (default: the model's)")
    group.add_argument("--length", type=parse_size, help="tokens of a row (default: 512)")
    group.add_argument("--rows", type=int, help="rows of the batch (default: 2)")
    group.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), help="of the weights (default: float32)")
    group.add_argument("--transport", default="auto", help="ring, double_ring, allgather, direct (default: auto)")
    group.add_argument("--ulysses", type=int, default=1, help="processes that exchange heads (default: 1)")
    group.add_argument(
        "--reference", choices=("auto", "sdpa", "eager", "own"), default="auto", help="attention of the one process"
    )
    group.add_argument("--past-refusals", action="store_true", help="compare a model that a rule refuses, too")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code in the model's folder")
    group.add_argument("--timeout", type=float, default=1800.0, help="seconds after which the ranks are ended")
    group.add_argument("--json", type=Path, help="also write the result to this file")


def run(options: argparse.Namespace) -> int:
    """Verify a model, print the report, and return 0 if it is exact, else 1.

    Raises:
        ValueError: if an option is wrong.
    """
    import torch

    from .model_verification import ModelVerification

    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_ranks = options.cp or (torch.cuda.device_count() if device == "cuda" else 2)
    _check(options, num_ranks, torch.cuda.device_count() if device == "cuda" else None)
    with tempfile.TemporaryDirectory() as folder:
        result_path = Path(folder) / "verification.json"
        command = recipe_command if options.config is not None else rank_command
        words = [*accelerate_command(num_ranks), *command(options, num_ranks, device, result_path)]
        done = _launch(words, options, device)
        if not result_path.is_file():
            lines = (done.stdout + done.stderr).splitlines()[-NUM_LINES:]
            print("\n".join([*lines, f"verdict: failed: the ranks ended with exit code {done.returncode}"]))
            return 1
        result = ModelVerification.from_json(json.loads(result_path.read_text()))
    print(result.report())
    if options.json is not None:
        options.json.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return int(not result.is_exact)


def _check(options: argparse.Namespace, num_ranks: int, num_gpus: int | None) -> None:
    if num_ranks < 2:
        raise ValueError(f"--cp {num_ranks}: at least 2 processes have to share a row. Set --cp 2 or more.")
    if num_gpus is not None and num_ranks > num_gpus:
        raise ValueError(
            f"--cp {num_ranks} needs as many GPUs, and this machine has {num_gpus}. Set --cp {num_gpus}, or hide the "
            'GPUs (CUDA_VISIBLE_DEVICES="") to verify on the CPU.'
        )
    if options.rows is not None and options.rows < 1:
        raise ValueError(f"--rows {options.rows} must be at least 1.")
    if options.config is not None:
        unused = {"--past-refusals": options.past_refusals, "--trust-remote-code": options.trust_remote_code}
        unused |= {f"--engine {options.engine}": options.engine != "ddp"}
        unused |= {f"--reference {options.reference}": options.reference != "auto"}
        if given := [name for name, is_given in unused.items() if is_given]:
            raise ValueError(f"{given[0]} is not for --config, which verifies a recipe as it trains. Leave it out.")
        if not (ROOT / "recipes").is_dir():
            raise ValueError(
                "--config needs the recipes of a checkout, which an installed package does not have. Start the recipe "
                "with verify_steps: 1 and verify_only: true, or name --model and --data."
            )


def _launch(words: list[str], options: argparse.Namespace, device: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if device == "cpu":  # DeepSpeed takes its device from the arguments of the Trainer
        environment["ACCELERATE_USE_CPU"] = str(options.engine != "zero3").lower()
        environment.setdefault("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the ranks did not end in {options.timeout:g} s. Set a smaller --length or --rows, or a larger --timeout."
        ) from None
    finally:
        if process.poll() is None:  # also after Ctrl-C: the ranks have a session of their own
            _end(process)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a launcher and its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)


def rank_command(options: argparse.Namespace, num_ranks: int, device: str, result_path: Path) -> list[str]:
    """Return the program of a rank and its arguments."""
    values: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("model", "engine", "tokenizer", "transport", "ulysses", "reference", "past_refusals")
    }
    values |= {"trust_remote_code": options.trust_remote_code, "cp": num_ranks, "device": device, "data": options.data}
    values |= {name: getattr(options, name) or default for name, default in DEFAULTS.items()}
    path = result_path.with_name("options.json")
    path.write_text(json.dumps(values))
    return ["-m", "ring_hf.verify.verify_rank", str(path), str(result_path)]


def recipe_command(options: argparse.Namespace, num_ranks: int, device: str, result_path: Path) -> list[str]:
    """Return the recipe of a run and its arguments, with which it writes `result_path` and trains nothing."""
    words = [str(ROOT / "recipes" / f"{options.recipe}.py"), str(options.config)]
    given = {
        "model": options.model,
        "tokenizer": options.tokenizer,
        "attn_implementation": options.attn,
        "max_length": options.length,
        "dtype": options.dtype,
        "per_device_train_batch_size": options.rows,
        "data": None if options.data is None else json.dumps([{"source": source} for source in options.data]),
        "ulysses_size": None if options.ulysses == 1 else options.ulysses,
        "transport": None if options.transport == "auto" else options.transport,
    }
    given |= {"context_parallel_size": num_ranks, "output_dir": result_path.parent}
    given |= {"verify_steps": 1, "verify_only": "true"}
    return [*words, *(word for key, value in given.items() if value is not None for word in (f"--{key}", str(value)))]
