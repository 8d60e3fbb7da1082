"""The main job from nothing: train a small model at 256 tokens, extend it to 2,048 with two processes that share each
sequence.

    scripts/quickstart

Every step is an ordinary command, which is printed before it runs. The results are in runs/quickstart: the two models
and perplexity.{md,json,png}. They replace those of an earlier run.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from arguments import option, parse
from refusals import run

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ["accelerate", "launch", "--config_file", "configs/accelerate/cpu_2proc.yaml", "recipes/finetune.py"]
MEASURE = ["python", "recipes/perplexity.py", "configs/quickstart/perplexity.yaml"]
BEFORE, AFTER = "trained at 256", "extended to 2,048"


@dataclass
class QuickstartArguments:
    """For a shorter trial; the defaults are those of configs/quickstart."""

    output_dir: str = option("runs/quickstart", "Folder for models and results.")
    pretrain_steps: int | None = option(None, "Steps of the first training, at 256 tokens.")
    extend_steps: int | None = option(None, "Steps of the extension, at 2,048 tokens.")
    max_windows: int | None = option(None, "Held-out windows to measure.")


def main() -> None:
    (args,) = parse((QuickstartArguments,), description=str(__doc__))
    folder = args.output_dir
    short, extended = f"{folder}/pretrained", f"{folder}/extended"
    for model_folder in (short, extended):
        shutil.rmtree(ROOT / model_folder, ignore_errors=True)
    windows = [] if args.max_windows is None else ["--max_windows", str(args.max_windows)]
    start = time.monotonic()
    run_step(
        "1/4  Train a byte-level Llama from scratch at 256 tokens (RoPE theta 10,000), data-parallel on two processes",
        [*LAUNCH, "configs/quickstart/pretrain.yaml", "--output_dir", short, *max_steps_option(args.pretrain_steps)],
    )
    run_step(
        "2/4  Measure it on held-out documents: beyond 256 tokens it breaks down",
        [
            *MEASURE,
            "--models",
            f"{BEFORE}={short}",
            "--trained_lengths",
            "256",
            "--output_dir",
            f"{folder}/before",
            *windows,
        ],
    )
    run_step(
        "3/4  Extend it to 2,048 tokens: raise theta, go on training; two processes share each sequence (ring_zigzag)",
        [
            *LAUNCH,
            "configs/quickstart/extend.yaml",
            "--model",
            short,
            "--output_dir",
            extended,
            *max_steps_option(args.extend_steps),
        ],
    )
    models = [f"{BEFORE}={folder}/before/perplexity.json", f"{AFTER}={extended}"]
    run_step(
        "4/4  Measure again, and compare",
        [*MEASURE, "--models", *models, "--trained_lengths", "256", "2048", "--output_dir", folder, *windows],
    )
    print(f"\nquickstart took {time.monotonic() - start:.0f} s. Models and results: {folder}")


def max_steps_option(steps: int | None) -> list[str]:
    return [] if steps is None else ["--max_steps", str(steps)]


def run_step(title: str, command: list[str]) -> None:
    """Print a title and the command, and run it from the root of the repository."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    # Two processes share the cores. A model this small gains nothing from more than four threads.
    threads = min(4, max(1, (os.cpu_count() or 2) // 2))
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **os.environ}
    programs = {"accelerate": [sys.executable, "-m", "accelerate.commands.launch"], "python": [sys.executable]}
    arguments = command[2:] if command[0] == "accelerate" else command[1:]
    done = subprocess.run([*programs[command[0]], *arguments], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"this step failed with exit status {done.returncode}; its messages are above")
    print(f"   ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    run(main)
