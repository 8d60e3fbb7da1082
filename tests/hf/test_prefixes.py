"""Prefix language modelling: the column reaches the mask, the same in one process and in several."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ring_hf.geometry import LAYOUTS, RingOptions
from ring_hf.hf import ContextParallelCollator, context
from ring_hf.hf.attention import announcements
from ring_hf.hf.batch_metadata import METADATA_KEY
from ring_hf.parallel import register_group
from tests.harness import assert_close, run_distributed
from tests.hf.models import llama, rank_of, rows

PREFIXES = (7, 0, 20, 5)


def examples():
    return [{**row, "prefix_length": p} for row, p in zip(rows(17, 23, 20, 9), PREFIXES, strict=True)]


def dense_mask(boundaries, prefixes, length):
    """[length, length], True where a query sees a key: the definition, token by token."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for start, end, prefix in zip(boundaries[:-1], boundaries[1:], prefixes, strict=True):
        for q in range(start, end):
            for k in range(start, end):
                seen[q, k] = k <= q or max(q, k) < start + prefix
    return seen


def dense_batch(packing):
    """The plain batch of one process and its mask, for `sdpa`."""
    batch = ContextParallelCollator(llama(), packing=packing).inner(rows(17, 23, 20, 9))
    if packing:
        mask = dense_mask((0, 17, 40, 60, 69), PREFIXES, 69)[None]
    else:
        mask = torch.stack([dense_mask((0, 23), (prefix,), 23) for prefix in PREFIXES])
    return {**batch, "attention_mask": mask[:, None]}


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def reference(packing):
    model = llama("sdpa")
    loss = model(**dense_batch(packing), use_cache=False).loss
    loss.backward()
    return loss.item(), gradient(model)


def test_column_becomes_one_number_per_document():
    with rank_of(4, 0):
        padded = ContextParallelCollator(llama(), prefix_lm=True)(examples())[METADATA_KEY].sequence
        packed = ContextParallelCollator(llama(), prefix_lm=True, packing=True)(examples())[METADATA_KEY].sequence
    assert padded.documents is None and padded.prefixes == ((7,), (0,), (20,), (5,))
    assert packed.documents == ((0, 17, 40, 60, 69, 72),) and packed.prefixes == ((7, 0, 20, 5, 0),)


def test_prefixes_are_part_of_the_fingerprint_and_those_of_one_token_change_nothing():
    def batch(*prefixes):
        features = [{**row, "prefix_length": p} for row, p in zip(rows(16, 16), prefixes, strict=True)]
        with rank_of(2, 0):
            return ContextParallelCollator(llama(), prefix_lm=True)(features)[METADATA_KEY]

    assert batch(3, 4).fingerprint != batch(4, 3).fingerprint
    assert batch(1, 0).sequence.prefixes is None and batch(2, 0).sequence.prefixes == ((2,), (0,))


def test_targets_inside_a_prefix_are_warned_of_once(caplog):
    with rank_of(2, 0), caplog.at_level(logging.WARNING, logger="ring_hf"):
        collator = ContextParallelCollator(llama(), prefix_lm=True)
        collator(examples())
        collator(examples())
    assert [record.getMessage()[:29] for record in caplog.records] == ["29 targets lie inside prefixe"]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_one_process_equals_the_dense_mask(packing):
    model = llama("ring_zigzag")
    loss = model(**ContextParallelCollator(model, prefix_lm=True, packing=packing)(examples())).loss
    loss.backward()
    want, want_gradient = reference(packing)
    assert loss.item() == pytest.approx(want, abs=1e-6)
    assert_close("gradient of one process", gradient(model), want_gradient, rms=1e-5)


def test_trainer_of_one_process_evaluates_and_trains_with_prefixes():
    model = llama("ring_zigzag")
    args = TrainingArguments(
        output_dir="unused",
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
    )
    collator = ContextParallelCollator(model, prefix_lm=True)
    trainer = Trainer(model, args, train_dataset=examples(), eval_dataset=examples(), data_collator=collator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference(False)[0], abs=1e-6)
    trainer.train()
    trainer.args.remove_unused_columns = True
    with pytest.raises(ValueError, match=r"Example 0 of the batch has no prefix_length.*remove_unused_columns=False"):
        trainer.evaluate()


def step(rank, world_size, layout, packing, settings):
    """Loss and gradient of this rank's shard, without a Trainer."""
    group = register_group(torch.distributed.group.WORLD)
    model = llama(f"ring_{layout}")
    context.activate(context.ProcessContext(world_size, rank, 1, 0, group, None, RingOptions(**settings)))
    batch = ContextParallelCollator(model, prefix_lm=True, packing=packing)(examples())
    context.activate(None)
    announcements.register(model)
    announcements.announce(model, batch[METADATA_KEY])
    loss = model(**batch, num_items_in_batch=torch.tensor(69.0 - 4)).loss
    loss.backward()
    return loss.item(), gradient(model)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_the_dense_mask(layout, packing):
    results = run_distributed(2, step, layout, packing, {})
    want, want_gradient = reference(packing)
    assert sum(loss for loss, _ in results) == pytest.approx(want, abs=1e-6)
    assert_close(f"gradient {layout}", sum(part for _, part in results), want_gradient, rms=1e-5)


@pytest.mark.parametrize(
    "settings", [{"ulysses_size": 2}, {"transport": "direct"}, {"transport": "allgather"}], ids=str
)
def test_two_processes_equal_the_dense_mask_by_every_way(settings):
    results = run_distributed(2, step, "zigzag", True, settings)
    want, want_gradient = reference(True)
    assert sum(loss for loss, _ in results) == pytest.approx(want, abs=1e-6)
    assert_close(f"gradient {settings}", sum(part for _, part in results), want_gradient, rms=1e-5)
