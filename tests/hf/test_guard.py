"""The guard without a Trainer, after the first step, and with several Trainers in one process."""

import logging

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer

from ring_hf import memory
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context, guard_model
from ring_hf.hf.batch_metadata import METADATA_KEY, InvalidBatch
from tests.hf.faults import LeftPadding, arguments
from tests.hf.models import llama, rows
from tests.support.harness import run_distributed


def model_and_rows(attention, weighted):
    model, examples = llama(attention), rows(16, 21, 13)
    if weighted:
        memory.apply(model, attention="none", ffn_block=None, loss_block=7)
        examples = [{**row, "loss_weights": [0.1 * (n % 7) for n in range(len(row["input_ids"]))]} for row in examples]
    return model, examples


def own_loop(rank, world_size, weighted):
    """Evaluate and train in a hand-written loop with Accelerate; return the losses and a gradient."""
    accelerator = Accelerator(cpu=True, parallelism_config=ContextParallelConfig(context_parallel_size=world_size))
    model, examples = model_and_rows("ring_zigzag", weighted)
    guard_model(model)
    loader = DataLoader(examples, batch_size=2, collate_fn=ContextParallelCollator(model))
    loader = accelerator.prepare(loader)
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in loader]
    model.train()
    batch = next(iter(loader))
    loss = model(**batch, num_items_in_batch=torch.tensor(35.0)).loss  # 15 + 20 targets in the first two rows
    loss.backward()
    gradient = accelerator.reduce(model.lm_head.weight.grad.clone(), reduction="sum")
    context.activate(None)
    return losses, gradient


@pytest.mark.parametrize("weighted", [False, True])
def test_hand_written_loop_equals_one_process(weighted):
    model, examples = model_and_rows("sdpa", weighted)
    collate = ContextParallelCollator(model)
    batches = [collate(examples[:2]), collate(examples[2:])]
    with torch.no_grad():
        expected_losses = [model(**batch).loss.item() for batch in batches]
    model(**batches[0], num_items_in_batch=35).loss.backward()
    for losses, gradient in run_distributed(2, own_loop, weighted):
        assert losses == pytest.approx(expected_losses, abs=1e-6)
        difference = (gradient - model.lm_head.weight.grad).abs().max().item()
        print(f"hand-written loop: worst gradient difference {difference:.2e}")
        assert difference < 1e-6


def invalid_second_batch(rank, world_size):
    """Return the message of an invalid batch after a valid one."""
    model = llama()
    collator = ContextParallelCollator(model)
    trainer = Trainer(model, arguments(), train_dataset=rows(16, 16), data_collator=collator)
    model.train()
    model(**collator(rows(16, 16)))
    batch = ContextParallelCollator(model, inner=LeftPadding())(rows(16, 12))
    assert isinstance(batch[METADATA_KEY], InvalidBatch) and trainer.model is model
    try:
        model(**batch)
    except ValueError as error:
        return str(error)
    finally:
        context.activate(None)


def test_invalid_batch_after_the_first_step_raises_its_message():
    for message in run_distributed(2, invalid_second_batch):
        assert message.startswith("attention_mask has left padding")


def two_trainers(rank, world_size):
    """Train a Trainer that was made before another one without context parallelism, which replaces Accelerate's state.

    Return whether each had a context, and the message that the first one raises.
    """
    model = llama()
    collator = ContextParallelCollator(model)
    first = Trainer(model, arguments(), train_dataset=rows(16, 20, 12, 16), data_collator=collator)
    has_context = [context.current() is not None]
    without = arguments(ContextParallelConfig(context_parallel_size=1))
    Trainer(llama("sdpa"), without, train_dataset=rows(16, 16, 16, 16), data_collator=collator).train()
    has_context.append(context.current() is not None)
    try:
        first.train()
    except ValueError as error:
        return has_context, str(error)
    finally:
        context.activate(None)


def test_earlier_trainer_is_refused_after_a_later_one():
    """Accelerate keeps one state per process: after the second Trainer, the loader of the first gives every rank other
    rows."""
    for has_context, message in run_distributed(2, two_trainers):
        assert has_context == [True, False]
        assert message.startswith("The ranks disagree about the batch")


def logged_messages(rank, world_size):
    """Return what the Trainer's callback logs; only the first process logs."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ring_hf")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        config = ContextParallelConfig(
            context_parallel_size=world_size, ulysses_size=2, head_chunks=2, transport="direct"
        )
        model = llama("ring_balanced")
        Trainer(model, arguments(config), train_dataset=rows(16), data_collator=ContextParallelCollator(model))
    finally:
        logger.removeHandler(handler)
        context.activate(None)
    return messages


def test_resolved_degrees_are_logged_once():
    first, *others = run_distributed(4, logged_messages)
    assert len(first) == 1 and others == [[], [], []]
    assert first[0].startswith(
        "context parallelism: ring_balanced (layout balanced), 4 ranks per sequence = ring 2 x ulysses 2, "
        "inner ring 1, transport direct, heads in 2 chunks, engine DDP, 1 data-parallel replicas, kernel auto, "
        "overlap on"
    )
