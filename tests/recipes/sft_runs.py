"""Runs `recipes/sft.py` once for each case, in the processes of one launch: `sft_runs.py FOLDER BASE_MODEL`.

The run of a case is FOLDER/CASE. `full` builds a new model; the others start from BASE_MODEL.
"""

import os
import shutil
import sys
from pathlib import Path

import sft
import torch

CHECKPOINT = 3
BASE = ["--model", "{base}"]
ADAPTER = [*BASE, "--use_peft", "true", "--lora_r", "4", "--learning_rate", "1e-2"]
COMPLETIONS = ["--format", "prompt_completion", "--data", "{data}/completions.jsonl", "--assistant_only_loss", "false"]
MIXTURE = "[{{source: {data}/chat.jsonl, weight: 7}}, {{source: {data}/completions.jsonl, format: prompt_completion, "
MIXTURE += "weight: 3, overlong: truncate}}]"
CASES = {
    "full": ["--packing", "true", "--chat_template_path", "{data}/chat.jinja"],
    "continued": ["--packing", "true", "--chat_template_path", "{data}/chat.jinja"],
    "adapter": [
        *ADAPTER,
        "--data",
        MIXTURE,
        "--lora_modules_to_save",
        "lm_head",
        "--merge_adapter",
        "true",
        "--rope_theta",
        "20000",
    ],
    "dora in 4 bits": [*ADAPTER, "--use_dora", "true", "--load_in_4bit", "true", "--lora_alpha", "4"],
    "examples": [*BASE, *COMPLETIONS, "--packing", "true", "--loss_weighting", "examples", "--overlong", "truncate"],
}
CONTROL = {"tokens": [*BASE, *COMPLETIONS, "--packing", "true", "--overlong", "truncate"]}  # one process runs it


def main() -> None:
    folder, base = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    for name, options in (CASES if size > 1 else {**CASES, **CONTROL}).items():
        if name == "continued" and os.environ.get("RANK", "0") == "0":
            checkpoint = f"checkpoint-{CHECKPOINT}"
            shutil.copytree(folder / "full" / checkpoint, folder / name / checkpoint)
        arguments = [option.format(base=base, data=folder.parent) for option in options]
        size_options = ["--context_parallel_size", str(size)] if size > 1 else []
        settings = folder.parent / ("base.yaml" if "--model" in arguments else "run.yaml")
        sys.argv = ["sft.py", str(settings), *size_options, *arguments, "--output_dir", str(folder / name)]
        if size > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
        sft.main()


if __name__ == "__main__":
    main()
