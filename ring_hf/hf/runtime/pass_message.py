"""What ranks tell each other at every forward pass of a sharded batch: 64 bytes, before anything is exchanged.

Ranks that share a sequence must hold shards of the same batch, in every step and not only in the first: whatever is
drawn at random on one rank alone (a callback that samples text, an augmentation in a loader worker) makes samplers
drift apart later. So each pass begins with one small `all_gather` of all processes. It carries the fingerprint of the
batch, whether this rank has something to say that does not fit into the message (an error, the facts of a first
pass), the number of target tokens and the number that the caller divides by, and what the loss of the pass before was
multiplied with and added to.
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
        needs_agreement: whether this rank wants all ranks to compare their facts and errors.
        num_targets: target tokens of this rank's shard (or the sum of their weights).
        num_items: `num_items_in_batch` as the caller passed it; NaN if it did not.
        loss_factor, loss_residual, loss_bar: of the last backward pass (see `loss_monitor.py`), and what rounding may
            make of the residual; NaN if there is none to compare.
    """

    fingerprint: str
    is_training: bool
    needs_agreement: bool
    num_targets: float = 0.0
    num_items: float = float("nan")
    loss_factor: float = float("nan")
    loss_residual: float = float("nan")
    loss_bar: float = float("nan")

    def encode(self) -> list[int]:
        """Return eight 64-bit integers."""
        digest = bytes.fromhex(self.fingerprint)
        flags = self.is_training + 2 * self.needs_agreement
        floats = (self.num_targets, self.num_items, self.loss_factor, self.loss_residual, self.loss_bar)
        return [*struct.unpack("<qq", digest), flags, *map(_bits, floats)]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> "PassMessage":
        fingerprint = struct.pack("<qq", *numbers[:2]).hex()
        flags = numbers[2]
        return cls(fingerprint, bool(flags & 1), bool(flags & 2), *(_number(bits) for bits in numbers[3:]))


def exchange(message: PassMessage, device: torch.device) -> list[PassMessage]:
    """Return the messages of all processes, in the order of their ranks. A collective call."""
    return [PassMessage.decode(numbers) for numbers in gather_numbers(message.encode(), device)]


def find_disagreement(messages: Sequence[PassMessage], context: ProcessContext) -> str | None:
    """Return what the ranks of any group disagree about, for an error that is the same on every rank."""
    for group in groups_of(messages, context):
        for label, values in (
            ("the mode", ["training" if m.is_training else "evaluation" for _, m in group]),
            ("the batch (hash of its tokens, labels and documents)", [m.fingerprint for _, m in group]),
            ("num_items_in_batch", [f"{m.num_items:.8g}" for _, m in group]),
        ):
            if len(set(values)) > 1:
                listed = ", ".join(f"rank {rank}: {value}" for (rank, _), value in zip(group, values, strict=True))
                return f"the ranks that share a sequence disagree about {label} ({listed})"
    return None


def groups_of(messages: Sequence[PassMessage], context: ProcessContext) -> list[list[tuple[int, PassMessage]]]:
    """Return (rank, message) by group: the ranks that share a sequence are neighbours in the mesh."""
    numbered = list(enumerate(messages))
    return [numbered[first : first + context.size] for first in range(0, len(numbered), context.size)]


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
