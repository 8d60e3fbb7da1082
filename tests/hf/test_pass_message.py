"""The message that ranks exchange in every forward pass: its encoding, and the differences that raise."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context
from ring_hf.hf.runtime.loss_monitor import find_loss_mismatch
from ring_hf.hf.runtime.pass_message import NO_FINGERPRINT, PassMessage, find_disagreement
from tests.hf.faults import arguments
from tests.hf.models import context_of, llama, rows
from tests.support.harness import run_distributed

FINGERPRINTS = st.binary(min_size=16, max_size=16).map(bytes.hex)
NUMBERS = st.floats(allow_nan=False)
MESSAGES = st.builds(PassMessage, FINGERPRINTS, st.booleans(), st.booleans(), *[NUMBERS] * 5, st.booleans())
MESSAGE = PassMessage("ab" * 16, True, False, 3.0, 9.0, 2.0, 0.0, 1e-6)


@given(MESSAGES)
def test_messages_encode_to_64_bytes_and_decode(message):
    numbers = message.encode()
    assert len(numbers) == 8 and all(-(2**63) <= number < 2**63 for number in numbers)
    assert PassMessage.decode(torch.tensor(numbers, dtype=torch.int64).tolist()) == message


def test_message_without_a_backward_pass_has_no_loss():
    decoded = PassMessage.decode(PassMessage(NO_FINGERPRINT, False, True).encode())
    assert math.isnan(decoded.loss_factor) and math.isnan(decoded.loss_residual)
    assert find_loss_mismatch([decoded, MESSAGE], context_of(2, 0)) is None


def test_ranks_must_agree_within_a_group_only():
    other = replace(MESSAGE, fingerprint="cd" * 16)
    assert find_disagreement([MESSAGE, MESSAGE, other, other], context_of(2, 0)) is None
    message = find_disagreement([MESSAGE, MESSAGE, other, MESSAGE], context_of(2, 0))
    assert f"rank 2: {'cd' * 16}, rank 3: {'ab' * 16}" in message
    assert "num_items_in_batch (rank 0: 9, rank 1: 4)" in find_disagreement(
        [MESSAGE, replace(MESSAGE, num_items=4.0)], context_of(2, 0)
    )
    assert "the mode (rank 0: training, rank 1: evaluation)" in find_disagreement(
        [MESSAGE, replace(MESSAGE, is_training=False)], context_of(2, 0)
    )


@pytest.mark.parametrize(
    ("change", "expected_message"),
    [
        ({"loss_factor": 2.1}, r"multiplies the loss of the model by"),
        ({"loss_residual": 1e-3}, r"adds to the loss of the model"),
        ({"loss_residual": 5e-7}, None),  # rounding
        ({"loss_factor": 2.0 + 1e-7}, None),
    ],
)
def test_losses_may_differ_by_the_same_factor_and_term_on_all_ranks(change, expected_message):
    common = find_loss_mismatch([replace(MESSAGE, **change)] * 2, context_of(2, 0))
    assert common is None
    message = find_loss_mismatch([MESSAGE, replace(MESSAGE, **change)], context_of(2, 0))
    assert (message is None) if expected_message is None else expected_message in message


class DrawsOnRankZero(TrainerCallback):
    """Advances the random numbers of rank 0 in the middle of an epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and state.is_world_process_zero:
            torch.rand(7)


class Augmented(torch.utils.data.Dataset):
    """Rows with a token that PyTorch's global generator replaces at random."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        row = rows(16, seed=index)[0]
        if torch.rand(()) < 0.9:
            row = {key: [*values[:-1], int(torch.randint(1, 60, ()))] for key, values in row.items()}
        return row


def train_with_drift(rank, world_size):
    """Return the last step and the error of a run whose ranks draw different random numbers."""
    model = llama()
    args = arguments()
    args.max_steps = 12
    trainer = Trainer(
        model,
        args,
        train_dataset=Augmented(),
        data_collator=ContextParallelCollator(model),
        callbacks=[DrawsOnRankZero()],
    )
    try:
        trainer.train()
    except ValueError as error:
        return trainer.state.global_step, str(error)
    finally:
        context.reset()
    return trainer.state.global_step, "nothing was raised"


def test_diverging_batches_raise_with_step_and_fingerprints():
    (step, message), other = run_distributed(2, train_with_drift)
    assert (step, message) == other and 3 <= step <= 5
    assert message.startswith(
        f"In optimizer step {step + 1}: the ranks that share a sequence disagree about the batch"
    )
    assert "rank 0: " in message and "rank 1: " in message and "Random numbers were drawn" in message


def run_loop(rank, world_size, change, count_difference, uses_accelerator=True):
    """Run a hand-written loop; return the number of backward passes and the error.

    Args:
        change: of the loss of rank 1, in the second step.
        count_difference: of num_items_in_batch between the ranks; None: it is not passed.
        uses_accelerator: whether `accelerator.backward` runs the backward pass.
    """
    accelerator = Accelerator(cpu=True, parallelism_config=ContextParallelConfig(context_parallel_size=2))
    model = llama()
    loader = DataLoader(rows(*[16] * 8), batch_size=2, collate_fn=ContextParallelCollator(model))
    model, loader = accelerator.prepare(model, loader)
    num_backward = 0
    try:
        for step, batch in enumerate(loader):
            if count_difference is not None:
                batch["num_items_in_batch"] = torch.tensor(30.0 + count_difference * rank)
            loss = model(**batch).loss
            if rank == 1 and step == 1:
                loss = change(loss)
            if uses_accelerator:
                accelerator.backward(loss)
            else:
                loss.backward()
            num_backward += 1
    except ValueError as error:
        return num_backward, str(error)
    finally:
        context.reset()
    return num_backward, "nothing was raised"


def plus_constant(loss):
    return loss + 0.1


def squared(loss):
    return loss**2


def same(loss):
    return loss


@pytest.mark.parametrize(
    ("change", "expected_message"),
    [(plus_constant, "adds to the loss of the model"), (squared, "multiplies the loss of the")],
)
def test_a_loss_that_changes_later_is_refused_with_the_next_pass(change, expected_message):
    for num_backward, message in run_distributed(2, run_loop, change, None):
        assert num_backward == 2 and expected_message in message


def test_the_factor_of_a_plain_backward_pass_is_compared():
    for num_backward, message in run_distributed(2, run_loop, squared, None, False):
        assert num_backward == 2 and "multiplies the loss of the" in message
    for num_backward, message in run_distributed(2, run_loop, same, None, False):
        assert (num_backward, message) == (4, "nothing was raised")


@pytest.mark.parametrize("count_difference", [None, 0, 1])
def test_counts_that_differ_between_ranks_are_refused(count_difference):
    for num_backward, message in run_distributed(2, run_loop, same, count_difference):
        if count_difference:
            assert num_backward == 0 and "num_items_in_batch (rank 0: 30, rank 1: 31)" in message
        else:
            assert (num_backward, message) == (4, "nothing was raised")
