"""Prefix language modelling equals a dense mask, in one process and in several."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ring_hf.geometry import LAYOUTS, Mask, RingOptions, ShardedSequence
from ring_hf.hf import ContextParallelCollator, context
from ring_hf.hf.attention import announcements
from ring_hf.hf.batch_metadata import METADATA_KEY
from ring_hf.parallel import register_group
from ring_hf.testing import assert_close, dense_mask
from tests.hf.models import llama, rank_of, rows
from tests.support.harness import run_distributed

PREFIXES = (7, 0, 20, 5)


def examples():
    return with_prefixes(rows(17, 23, 20, 9), PREFIXES)


def with_prefixes(features, prefix_lengths):
    return [
        {**row, "prefix_length": prefix_length} for row, prefix_length in zip(features, prefix_lengths, strict=True)
    ]


def visible_keys(documents, prefixes, length):
    """`[rows, length, length]`, True where a query sees a key."""
    sequence = ShardedSequence("contiguous", length, 1, documents, prefixes=prefixes)
    return dense_mask(sequence, Mask(), len(prefixes))


def dense_batch(packing):
    """Return the plain batch of one process with a dense mask, for `sdpa`."""
    batch = ContextParallelCollator(llama(), packing=packing).inner(rows(17, 23, 20, 9))
    if packing:
        mask = visible_keys(((0, 17, 40, 60, 69),), (PREFIXES,), 69)
    else:
        mask = visible_keys(None, tuple((prefix,) for prefix in PREFIXES), 23)
    return {**batch, "attention_mask": mask[:, None]}


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def reference(packing):
    model = llama("sdpa")
    loss = model(**dense_batch(packing), use_cache=False).loss
    loss.backward()
    return loss.item(), gradient(model)


def test_prefix_column_becomes_one_number_per_document():
    with rank_of(4, 0):
        padded = ContextParallelCollator(llama(), prefix_lm=True)(examples())[METADATA_KEY].sequence
        packed = ContextParallelCollator(llama(), prefix_lm=True, packing=True)(examples())[METADATA_KEY].sequence
    assert padded.documents is None and padded.prefixes == ((7,), (0,), (20,), (5,))
    assert packed.documents == ((0, 17, 40, 60, 69, 72),) and packed.prefixes == ((7, 0, 20, 5, 0),)


def test_prefixes_enter_the_fingerprint_and_one_token_is_causal():
    def metadata(*prefixes):
        with rank_of(2, 0):
            collator = ContextParallelCollator(llama(), prefix_lm=True)
            return collator(with_prefixes(rows(16, 16), prefixes))[METADATA_KEY]

    assert metadata(3, 4).fingerprint != metadata(4, 3).fingerprint
    assert metadata(1, 0).sequence.prefixes is None and metadata(2, 0).sequence.prefixes == ((2,), (0,))


def test_targets_in_prefixes_are_logged_once(caplog):
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
    expected_loss, expected_gradient = reference(packing)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    assert_close("gradient of one process", gradient(model), expected_gradient, rms=1e-5)


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
    """Return loss and gradient of this rank's shard, without a Trainer."""
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


def check_sums(results, expected, name):
    """Compare the sums over ranks of losses and gradients with those of one process."""
    losses, gradients = zip(*results, strict=True)
    expected_loss, expected_gradient = expected
    assert sum(losses) == pytest.approx(expected_loss, abs=1e-6)
    assert_close(f"gradient {name}", sum(gradients), expected_gradient, rms=1e-5)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_the_dense_mask(layout, packing):
    results = run_distributed(2, step, layout, packing, {})
    check_sums(results, reference(packing), layout)


@pytest.mark.parametrize(
    "settings", [{"ulysses_size": 2}, {"transport": "direct"}, {"transport": "allgather"}], ids=str
)
def test_every_transport_equals_the_dense_mask(settings):
    results = run_distributed(2, step, "zigzag", True, settings)
    check_sums(results, reference(True), settings)
