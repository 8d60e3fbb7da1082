"""A tiny model learns to retrieve at 2K tokens from scratch, two processes sharing each sequence; then it is measured.

A Llama of two layers is trained by the unmodified Trainer on packed needle prompts (the task of `recipes/evaluate.py`,
other seeds), at short lengths first. `recipes/evaluate.py` then measures the grid of lengths and depths twice: over
the cache that two processes share, and in one process. The scores must be equal cell by cell, and the mean above 95 %.

    python scripts/train_retrieval.py --output runs/needle     # about ten minutes on two CPU cores
    python scripts/train_retrieval.py --output runs/needle --steps 2 2 2 --rounds 1     # a first look

The folder then holds the model, a folder of results for two processes and for one, with heat maps, and retrieval.md.
The exit code is 1 if a cell differs or the mean score is too low.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.launcher import accelerate_command
from scripts.bench_harness import environment_info

ROOT = Path(__file__).resolve().parents[1]
TEXT_CHARACTERS = 2_000_000  # of the filler
PASSED = 0.95


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model and the results")
    parser.add_argument("--task", default="needle", help="a retrieval task with a depth (default: needle)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens of prompts, ascending"
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[300, 150, 800], help="steps at each; the last mix all"
    )
    parser.add_argument("--processes", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--rows", type=int, default=2, help="rows of the longest length in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--shortest", type=int, default=100, help="fewest tokens of a training prompt")
    parser.add_argument("--rounds", type=int, default=3, help="examples of each cell of the grid")
    parser.add_argument("--depths", type=int, default=10, help="depths of the grid")
    parser.add_argument("--train", action="store_true", help="only train; the processes are started already")
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> None:
    """Train in the processes of this launch and save model and tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    import ring_hf
    from ring_hf.data import load_documents
    from ring_hf.evaluation.haystack import Filler
    from scripts.retrieval_rows import ANSWER_TOKENS, RetrievalRows, build_tokenizer, curriculum

    text = "\n\n".join(row["text"] for row in load_documents("builtin"))[:TEXT_CHARACTERS]
    tokenizer = build_tokenizer(text, arguments.vocabulary)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 32,
        max_position_embeddings=2 * arguments.lengths[-1],
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="ring_zigzag",
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False  # in training; its generation_config keeps the cache
    rows = curriculum(arguments.steps, arguments.lengths, arguments.rows)
    num_steps = len(rows) // arguments.rows
    settings = TrainingArguments(
        output_dir=str(arguments.output / "training"),
        max_steps=num_steps,
        per_device_train_batch_size=arguments.rows,
        train_sampling_strategy="sequential",
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, num_steps * 2 // 5)},
        warmup_steps=min(50, num_steps // 4),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_find_unused_parameters=False,
        parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=arguments.processes),
    )
    length = arguments.lengths[-1] + 2 * ANSWER_TOKENS  # the longest prompt and its answer
    filler = Filler(text, tokenizer)
    trainer = Trainer(
        model,
        settings,
        data_collator=ring_hf.ContextParallelCollator(model),
        train_dataset=RetrievalRows(arguments.task, rows, length, arguments.shortest, filler, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    model.config.use_cache = True
    trainer.save_model(str(arguments.output / "model"))


def evaluate(arguments: argparse.Namespace, num_processes: int) -> Path:
    """Measure the grid with `recipes/evaluate.py` and return the folder of the results."""
    folder = arguments.output / f"grid-of-{num_processes}"
    command = ["recipes/evaluate.py", "--models", f"model={arguments.output / 'model'}", "--tasks", arguments.task]
    command += ["--lengths", *map(str, arguments.lengths), "--num_depths", str(arguments.depths)]
    command += ["--rounds", str(arguments.rounds), "--short_context_length", "0", "--output_dir", str(folder)]
    run(num_processes, command)
    return folder


def run(num_processes: int, command: list[str]) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*accelerate_command(num_processes), *command], check=True, cwd=ROOT, env=environment)


def read_cells(folder: Path) -> dict[str, tuple[float, str]]:
    """Return score and text of every cell of a grid."""
    records = [json.loads(line) for line in (folder / "model.jsonl").read_text().splitlines()[1:]]
    return {json.dumps(record["cell"]): (record["score"], record["text"]) for record in records}


def compare(arguments: argparse.Namespace, seconds: dict[str, float]) -> tuple[str, bool]:
    """Return a report of both grids, and whether they are equal and good enough."""
    shared, alone = (read_cells(arguments.output / f"grid-of-{count}") for count in (arguments.processes, 1))
    scores_equal = sum(shared[cell][0] == alone[cell][0] for cell in alone)
    texts_equal = sum(shared[cell][1] == alone[cell][1] for cell in alone)
    mean = sum(score for score, _ in shared.values()) / len(shared)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    table = (arguments.output / f"grid-of-{arguments.processes}" / "retrieval.md").read_text().strip()
    text = (
        f"{', '.join(f'{key} {value}' for key, value in environment_info().items())}\n\n"
        f"{arguments.layers} layers, hidden {arguments.hidden}, {sum(arguments.steps)} steps of {arguments.rows} x "
        f"{arguments.lengths[-1]} tokens, {arguments.processes} processes that share each sequence; {times}\n\n"
        f"{table}\n\nmean {100 * mean:.1f} %; of {len(alone)} prompts, scores of one process are equal in "
        f"{scores_equal}, texts in {texts_equal}\n"
    )
    return text, shared.keys() == alone.keys() and scores_equal == len(alone) and mean > PASSED


def main() -> None:
    arguments = parse_arguments()
    arguments.output = arguments.output.resolve()
    if arguments.train:
        train(arguments)
        return
    seconds: dict[str, float] = {}

    def timed(name: str, function: Any, *values: Any) -> None:
        start = time.perf_counter()
        function(*values)
        seconds[name] = time.perf_counter() - start

    script = [str(Path(__file__).resolve()), *sys.argv[1:], "--output", str(arguments.output), "--train"]
    timed("training", run, arguments.processes, script)
    for num_processes in (arguments.processes, 1):
        timed(f"grid of {num_processes}", evaluate, arguments, num_processes)
    text, is_good = compare(arguments, seconds)
    (arguments.output / "retrieval.md").write_text(text)
    print(f"\n{text}")
    if not is_good:
        raise SystemExit(f"A cell differs from that of one process, or the mean is not above {100 * PASSED:.0f} %.")


if __name__ == "__main__":
    main()
