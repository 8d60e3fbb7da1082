"""Runs a recipe once for each of several YAML files, one after the other in the same processes:

    run_in_turn.py finetune=a/run.yaml sft=b/run.yaml ...

Each process prints the files that it has finished.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))


def main() -> None:
    importlib.import_module("model_card").plot_run = lambda *_: None  # pictures take longer than the steps
    for word in sys.argv[1:]:
        recipe, path = word.split("=", 1)
        sys.argv = [f"{recipe}.py", path]
        importlib.import_module(recipe).main()
        print(f"finished {path}", flush=True)


if __name__ == "__main__":
    main()
