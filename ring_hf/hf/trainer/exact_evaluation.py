"""`Trainer.evaluate()` and `predict()` under context parallelism: the numbers of one process with the whole batch.

Three things go wrong without this. The last batch of a data-parallel run repeats rows to fill up, which count in the
loss. The Trainer gathers one loss per rank and cuts the list to the number of examples, so whole shards are dropped.
And predictions arrive as shards, permuted. So: labels of repeated rows are masked and the targets counted again; every
rank returns the same loss, that of the whole batch over all ranks; and two methods of the accelerator are replaced on
the instance that the Trainer uses. `pad_across_processes`, which the Trainer calls on logits and labels first,
restores whole sequences, so that `preprocess_logits_for_metrics` and `compute_metrics` see rows as one process would;
`gather_for_metrics` then gathers over data-parallel replicas only, after checking that the ranks of a group hold the
same.

Shapes: B rows, S tokens of the whole row, C tokens of this rank.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.state import GradientState
from accelerate.utils import recursively_apply
from torch.utils.data import IterableDataset

from ring_hf.parallel import all_gather, join

from .. import context as process
from ..batch_metadata import IGNORE_INDEX, ContextParallelMetadata
from ..context import ProcessContext
from ..runtime.loss_monitor import find_other_loss
from ..runtime.pass_message import exchange
from ..runtime.runtime_state import runtime_state
from .engines import ENGINES


class Evaluator:
    """Evaluation in this process, for one accelerator."""

    def __init__(self, context: ProcessContext):
        self.context = context
        runtime_state.batch = None
        self.scalars_are_sums = False  # whether what a Trainer gathers as scalars are sums over tokens of this rank
        self.counts_first_labels = False  # whether the Trainer counts the first label of a row, which nothing predicts
        self._accelerator: Callable[[], Any] = lambda: None

    def install(self, accelerator: Any) -> None:
        """Replace methods on this accelerator, which is the one the Trainer or loop is about to use."""
        self._accelerator = weakref.ref(accelerator)  # this outlives the Trainer; its model and optimizer need not
        accelerator.pad_across_processes = self.pad_across_processes
        accelerator.gather_for_metrics = self.gather_for_metrics
        accelerator.backward = self.backward

    # In the backward pass

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run the backward pass and compare between ranks what was trained."""
        if runtime_state.captured is not None:
            runtime_state.captured.append(loss)
            return
        scales: list[torch.Tensor] = []  # what the engine multiplies the loss with
        handle = loss.register_hook(lambda gradient: scales.append(gradient.detach()))

        def compare() -> None:
            message = runtime_state.monitor.after_backward(loss, scales[0])
            if message is not None and (error := find_other_loss(exchange(message, loss.device), self.context)):
                raise ValueError(error)

        if ENGINES[self.context.engine].is_deepspeed:
            with _before_step(self._accelerator().deepspeed_engine_wrapped.engine, compare) as has_compared:
                self._stock("backward", loss, **kwargs)
        else:
            self._stock("backward", loss, **kwargs)
            has_compared = []
        handle.remove()
        if not has_compared:
            compare()

    # Around the forward pass of the model

    def error(self, batch: Any) -> str | None:
        """What would make the numbers of this evaluation wrong."""
        loader = GradientState().active_dataloader
        if loader is None or self.context.num_replicas == 1:
            return None
        if isinstance(loader.dataset, IterableDataset):
            return (
                f"An evaluation dataset without a length cannot be split exactly over {self.context.num_replicas} "
                "replicas: the rows that fill the last batch cannot be told. Use a map-style dataset, or "
                "dp_replicate_size=1."
            )
        if self._num_real_examples() is not None and getattr(batch, "examples", None) == ():
            return (
                "The last evaluation batch repeats examples to fill all replicas, and the inner collator's rows do "
                "not show where examples begin. Evaluate a dataset whose length is a multiple of the batch, or use "
                "dp_replicate_size=1."
            )
        return None

    def prepare(self, batch: ContextParallelMetadata, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments, with repeated examples masked out and the targets of all ranks counted."""
        runtime_state.batch = batch
        shift_labels_BC = kwargs.get("shift_labels")
        if shift_labels_BC is None or kwargs.get("labels") is None:
            return kwargs
        shift_labels_BC = self._mask_repeated(shift_labels_BC, batch)
        counted_BC = shift_labels_BC != IGNORE_INDEX
        weights_BC = kwargs.get("loss_weights") if kwargs.get("num_items_in_batch") is None else None  # then a mean
        count = counted_BC.sum() if weights_BC is None else (weights_BC * counted_BC).sum()
        if self.counts_first_labels and weights_BC is None and batch.sequence.segments(batch.rank)[0].start == 0:
            count = count + (kwargs["labels"][: self._num_real_examples(), 0] != IGNORE_INDEX).sum()
        return {**kwargs, "shift_labels": shift_labels_BC, "num_items_in_batch": self._sum(count)}

    def loss(self, loss_of_rank: torch.Tensor, scaled_by_trainer: bool) -> torch.Tensor:
        """The loss of the whole batch from every rank's share of it (its sum over the targets of all ranks).

        The Trainer multiplies by the number of processes what it takes for a share: then divide by it here.
        """
        total = self._sum(loss_of_rank.detach())
        return total / (self.context.size * self.context.num_replicas) if scaled_by_trainer else total

    def mean_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean over all ranks, bit for bit the same everywhere."""
        return self._sum(value.detach()) / (self.context.size * self.context.num_replicas)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in one order on all of them: bit for bit the same everywhere."""
        for group in (self.context.group, self.context.replica_group):
            if group is not None:
                value = torch.stack(all_gather(value, group)).sum()
        return value

    def _num_real_examples(self) -> int | None:
        """How many of this rank's examples are no repetition, or None if all are."""
        state = GradientState()
        if self.context.num_replicas == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        per_replica = state.active_dataloader.total_batch_size // self.context.num_replicas
        return min(max(state.remainder - self.context.replica * per_replica, 0), per_replica)

    def _mask_repeated(self, shift_labels_BC: torch.Tensor, batch: ContextParallelMetadata) -> torch.Tensor:
        num_real = self._num_real_examples()
        if num_real is None:
            return shift_labels_BC
        shift_labels_BC = shift_labels_BC.clone()
        if batch.examples is None:
            shift_labels_BC[num_real:] = IGNORE_INDEX
            return shift_labels_BC
        index = [token for segment in batch.sequence.segments(batch.rank) for token in segment.range]
        first = batch.examples[num_real] - 1  # the token before it would predict its first one
        repeated_C = torch.tensor(index, device=shift_labels_BC.device) >= first
        return shift_labels_BC.masked_fill(repeated_C, IGNORE_INDEX)

    # What the Trainer calls on losses, logits and labels

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Shards along dim 1 become whole rows, without our padding; then Accelerate's own padding over replicas."""
        if runtime_state.batch is not None and dim == 1:
            tensor = recursively_apply(self._whole, tensor, error_on_other_type=True)
        return self._stock("pad_across_processes", tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def _whole(self, shard: torch.Tensor) -> torch.Tensor:
        batch = runtime_state.batch
        assert batch is not None
        self._refuse_other_config()
        if shard.ndim < 2 or shard.shape[1] != batch.shard_length:
            return shard
        if batch.examples is not None and self.context.num_replicas > 1:
            raise ValueError(
                f"Predictions of packed rows cannot be put in order over {self.context.num_replicas} data-parallel "
                "replicas. Set prediction_loss_only=True without include_for_metrics, use dp_replicate_size=1, or "
                "pad instead of packing."
            )
        segments = [batch.sequence.segments(rank) for rank in range(batch.sequence.num_ranks)]
        whole = join(all_gather(shard.contiguous(), self.context.group), segments, 1)
        return whole[:, : batch.unpadded_length]

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Every replica's part, in order and without repetitions."""
        if runtime_state.batch is None:
            return self._stock("gather_for_metrics", input_data, use_gather_object=use_gather_object)
        if self.scalars_are_sums and isinstance(input_data, torch.Tensor) and input_data.ndim == 0:
            return self._stock("gather", input_data)
        if use_gather_object:
            raise ValueError(
                "Gathering objects (eval_use_gather_object=True) is not supported with context parallelism. Set it "
                "to False."
            )
        return recursively_apply(self._gather, input_data, error_on_other_type=True)

    def _stock(self, method: str, *args: Any, **kwargs: Any) -> Any:
        accelerator = self._accelerator()
        assert accelerator is not None, "called without the accelerator it was installed on"
        return getattr(type(accelerator), method)(accelerator, *args, **kwargs)

    def _refuse_other_config(self) -> None:
        """Raise if batches were sharded by the config of another Trainer, made since."""
        current = process.current()
        mine, other = (None if c is None else (c.size, c.num_replicas) for c in (self.context, current))
        if mine != other:
            raise ValueError(
                f"This Trainer shares sequences among {self.context.size} ranks, but the one that was made last "
                f"among {1 if current is None else current.size}. Evaluate a Trainer before another one with another "
                "ContextParallelConfig is made, or make it again."
            )

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._refuse_other_config()
        tensor = tensor[None] if tensor.ndim == 0 else tensor.contiguous()
        sums = torch.stack(all_gather(_checksum(tensor), self.context.group))
        if not bool((sums == sums[0]).all()):
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} differs between ranks that share a sequence, so it was "
                "computed from shards and cannot be restored. compute_metrics and preprocess_logits_for_metrics get "
                "whole rows from the Trainer's own loop; set prediction_loss_only=True if a custom loop is used."
            )
        group = self.context.replica_group
        gathered = tensor if group is None else torch.cat(all_gather(tensor, group))
        state = GradientState()
        if state.end_of_dataloader and state.remainder > 0:
            gathered = gathered[: state.remainder]
        return gathered


@contextlib.contextmanager
def _before_step(engine: Any, compare: Callable[[], None]) -> Iterator[list[bool]]:
    """Within, DeepSpeed's engine, whose backward pass ends with the optimizer step, compares before it takes one."""
    step, has_compared = engine.step, []

    def compare_and_step(*args: Any, **kwargs: Any) -> Any:
        has_compared.append(True)
        compare()
        return step(*args, **kwargs)

    engine.step = compare_and_step
    try:
        yield has_compared
    finally:
        del engine.step


_active: Evaluator | None = None


def activate(evaluator: Evaluator | None) -> None:
    """Make `evaluator` the one of this process, for as long as its context is."""
    global _active
    _active = evaluator


def current_evaluator() -> Evaluator | None:
    """Return the evaluator of the current context, or None where sequences are whole."""
    return _active if _active is not None and _active.context is process.current() else None


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums and the size; ranks that share a sequence computed the same bits, so they are compared exactly."""
    flat = tensor.detach().flatten()
    sums = [flat.sum(dtype=torch.double), flat[::3].sum(dtype=torch.double)]
    size = torch.tensor(float(flat.numel()), dtype=torch.double, device=flat.device)
    return torch.nan_to_num(torch.stack([*sums, size]))
