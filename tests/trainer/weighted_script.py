"""Trains on packed examples with loss weights; rank 0 writes OUTPUT_FOLDER/results.json.

In one process, `one by one` is the judge: a loop that runs the examples of each step alone, without packing, padding
or Trainer, and takes the mean over them of their mean losses.
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import ring_hf
from ring_hf.data import (
    add_vision_vocabulary,
    build_byte_tokenizer,
    pack_documents,
    split_modalities,
    weigh_examples,
)
from ring_hf.data.byte_level import END_OF_TEXT
from ring_hf.data.tokens import COLUMNS
from ring_hf.data.vision_codes import (
    CODEBOOK,
    CODES_PER_FRAME,
    END_OF_FRAME,
    END_OF_VISION,
    tokenize_vision_codes,
)
from tests.hf.models import llama

STEPS, ROWS_PER_STEP, LENGTH, LEARNING_RATE = 4, 4, 48, 0.1


def packed(across: bool = False, weighted: bool = True) -> Dataset:
    """Return sequences of several examples, whose answers have 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for i in range(64):
        tokens = torch.randint(1, 64, (8 + i * 5 % 17,), generator=generator).tolist()
        num_targets = 1 + i * 7 % 12
        rows["input_ids"].append(tokens)
        rows["labels"].append([-100] * (len(tokens) - num_targets) + tokens[-num_targets:])
    examples = Dataset.from_dict(rows)
    return pack_documents(weigh_examples(examples) if weighted else examples, LENGTH, attend_across_documents=across)


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT)


def with_vision_codes() -> Dataset:
    """Return sequences of texts with images and videos, whose codes count half as much as their text."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(2 * STEPS * ROWS_PER_STEP):
        frames = [torch.randint(CODEBOOK, (CODES_PER_FRAME,), generator=generator).tolist() for _ in range(1 + i % 2)]
        codes = [code for frame in frames for code in (*frame, END_OF_FRAME)]
        content = ["See: " * (1 + i % 5) + "<vision>", *codes[:-1], END_OF_VISION, "</vision>", "dog, " * (i % 7)]
        rows.append(tokenize_vision_codes({"content": content}, tokenizer(), {"vision_weight": 0.5}))
    return pack_documents(Dataset.from_list(rows).cast(Features(COLUMNS)), 900)


def train(
    sequences: Dataset, folder: Path, context_parallel_size: int | None, batch: int, has_vision: bool = False
) -> list[dict[str, float]]:
    """Train with the Trainer; the logs hold the loss and grad norm of each step and an evaluation."""
    attention = "sdpa" if context_parallel_size is None else "ring_zigzag"
    model = llama(attention, vocab_size=258 if has_vision else 64)
    offset = add_vision_vocabulary(model, tokenizer()) if has_vision else None
    ring_hf.memory.apply(model, loss_block=16 if offset is None else 512)
    config = ring_hf.ContextParallelConfig(context_parallel_size=context_parallel_size)
    num_replicas = int(os.environ.get("WORLD_SIZE", "1")) // (context_parallel_size or 1)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS_PER_STEP // batch // num_replicas,
        per_device_eval_batch_size=ROWS_PER_STEP // num_replicas,
        train_sampling_strategy="sequential",
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=LEARNING_RATE,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        parallelism_config=None if context_parallel_size is None else config,
    )
    collator = ring_hf.ContextParallelCollator(model)
    trainer = Trainer(model, args, train_dataset=sequences, data_collator=collator)
    ring_hf.count_loss_weights(trainer)
    if offset is not None:
        ring_hf.log_modality_losses(trainer, offset)
    trainer.train()
    heldout = sequences.select(range(ROWS_PER_STEP))
    trainer.evaluate(heldout)
    if offset is not None:
        trainer.evaluate(split_modalities(heldout, offset))
    return trainer.state.log_history


def run_one_by_one(sequences: Dataset) -> list[dict[str, float]]:
    model = llama("sdpa").double()

    def mean_losses(rows: Dataset) -> list[torch.Tensor]:
        losses = []
        for row in rows.with_format("torch"):
            starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["input_ids"])]
            for start, stop in pairwise(starts):
                logits = model(input_ids=row["input_ids"][None, start:stop].long()).logits[0, :-1]
                losses.append(cross_entropy(logits, row["labels"][start + 1 : stop].long()))
        return losses

    logs = []
    for step in range(STEPS):
        losses = mean_losses(sequences.select(range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP)))
        loss = torch.stack(losses).mean()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
        logs.append({"loss": loss.item(), "grad_norm": norm.item()})
    with torch.no_grad():
        losses = mean_losses(sequences.select(range(ROWS_PER_STEP)))
    return [*logs, {"eval_loss": torch.stack(losses).mean().item()}]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sequences, across = packed(), packed(across=True)
    is_alone = "WORLD_SIZE" not in os.environ
    size = None if is_alone else 2
    runs: dict[str, Any] = {
        "examples": lambda: train(sequences, folder, size, 2),
        "attending across examples": lambda: train(across, folder, size, 4),
        "vision codes": lambda: train(with_vision_codes(), folder, size, 2, has_vision=True),
    }
    if is_alone:
        runs["one by one"] = lambda: run_one_by_one(sequences)
        runs["tokens"] = lambda: train(packed(weighted=False), folder, size, 2)
    else:
        runs["data parallel"] = lambda: train(sequences, folder, 1, 1)
    results = {}
    for name, run in runs.items():
        set_seed(0)
        results[name] = run()
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
