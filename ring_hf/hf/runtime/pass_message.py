"""The message that every rank sends before the forward pass of a sharded batch: 64 bytes, one `all_gather`.

Ranks that share a sequence must hold shards of the same batch in every step, not only in the first: random numbers
drawn on one rank alone (a callback that samples text, an augmentation in a loader worker) make samplers diverge later.
So each pass begins with one small `all_gather` over all processes. The message holds the fingerprint of the batch,
whether this rank needs a longer comparison (it has an error, or this is a first pass), the number of target tokens,
the number that the caller divides by, and how the last trained loss differed from the model's loss.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ring_hf.parallel import gather_numbers

from ..context import ProcessContext

NO_FINGERPRINT = "0" * 32


@dataclass(frozen=True)
class PassMessage:
    """The message of one rank.

    Attributes:
        fingerprint: 32 hex digits, the hash of the whole batch (see `ContextParallelMetadata`).
        is_training: the mode of the model.
        needs_agreement: whether this rank asks all ranks for `raise_on_all_ranks`, to compare values and errors.
        num_targets: target tokens of this rank's shard (or the sum of their weights).
        num_items: `num_items_in_batch` as the caller passed it; NaN if it did not.
        loss_factor, loss_residual: of the last backward pass, in which the loss `loss_factor * model_loss +
            loss_residual` was trained (see `loss_monitor.py`); NaN if there is nothing to compare.
        loss_tolerance: largest difference of `loss_residual` between ranks that is rounding.
        is_finite: whether that loss was neither NaN nor infinite.
    """

    fingerprint: str
    is_training: bool
    needs_agreement: bool
    num_targets: float = 0.0
    num_items: float = float("nan")
    loss_factor: float = float("nan")
    loss_residual: float = float("nan")
    loss_tolerance: float = float("nan")
    is_finite: bool = True

    def encode(self) -> list[int]:
        """Return eight signed 64-bit integers."""
        digest = bytes.fromhex(self.fingerprint)
        flags = self.is_training + 2 * self.needs_agreement + 4 * (not self.is_finite)
        floats = (self.num_targets, self.num_items, self.loss_factor, self.loss_residual, self.loss_tolerance)
        return [*struct.unpack("<qq", digest), flags, *map(_float_to_bits, floats)]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> "PassMessage":
        """Return the message that `encode` made these eight integers of."""
        fingerprint = struct.pack("<qq", *numbers[:2]).hex()
        flags = numbers[2]
        targets, items, factor, residual, tolerance = map(_bits_to_float, numbers[3:])
        is_training, needs_agreement, is_finite = bool(flags & 1), bool(flags & 2), not flags & 4
        return cls(fingerprint, is_training, needs_agreement, targets, items, factor, residual, tolerance, is_finite)


def exchange_messages(message: PassMessage, device: torch.device) -> list[PassMessage]:
    """Return the messages of all processes, ordered by rank. A collective call."""
    return [PassMessage.decode(numbers) for numbers in gather_numbers(message.encode(), device)]


def find_disagreement(messages: Sequence[PassMessage], context: ProcessContext) -> str | None:
    """Return the first difference within a group of ranks that share a sequence, or None.

    The result is the same on every rank, so all can raise it together.
    """
    for group in group_by_sequence(messages, context):
        for label, values in (
            ("the mode", ["training" if m.is_training else "evaluation" for _, m in group]),
            ("the batch (hash of its tokens, labels and documents)", [m.fingerprint for _, m in group]),
            ("num_items_in_batch", [f"{m.num_items:.8g}" for _, m in group]),
        ):
            if len(set(values)) > 1:
                listed = ", ".join(f"rank {rank}: {value}" for (rank, _), value in zip(group, values, strict=True))
                return f"the ranks that share a sequence disagree about {label} ({listed})"
    return None


def group_by_sequence(messages: Sequence[PassMessage], context: ProcessContext) -> list[list[tuple[int, PassMessage]]]:
    """Return pairs of global rank and message, one list for each replica: ranks that share a sequence are neighbours
    in the device mesh."""
    numbered = list(enumerate(messages))
    return [numbered[start : start + context.size] for start in range(0, len(numbered), context.size)]


def _float_to_bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _bits_to_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
