"""`Trainer.evaluate()` and `predict()` under context parallelism return the results of one process.

Three things would be wrong otherwise. The last batch of a data-parallel run is filled up with repeated rows, which
count in the loss. The Trainer gathers one loss per rank and cuts the list to the number of examples, which drops whole
shards. And predictions arrive as permuted shards. So labels of repeated rows are masked and targets counted again,
every rank returns the loss of the whole batch over all ranks, and methods of the Trainer's accelerator are replaced on
the instance. The Trainer calls `pad_across_processes` on logits and labels first: it restores whole sequences, so that
`preprocess_logits_for_metrics` and `compute_metrics` see rows as in one process. Then `gather_for_metrics` gathers
over data-parallel replicas only, after it has checked that the ranks of a group hold the same values.

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
from ..runtime.loss_monitor import find_loss_mismatch
from ..runtime.nonfinite import raise_if_not_finite
from ..runtime.pass_message import exchange_messages
from ..runtime.runtime_state import runtime_state
from .engines import ENGINES


class Evaluator:
    """Evaluation in this process, for one accelerator.

    Attributes:
        scalars_are_sums: whether the scalars that a Trainer gathers are sums over the tokens of this rank.
        counts_first_labels: whether the Trainer counts the first label of a row, which no token predicts.
        counts_weights: whether the Trainer divides by the sum of `loss_weights`, not by the number of targets.
    """

    def __init__(self, context: ProcessContext):
        self.context = context
        runtime_state.evaluation_batch = None
        self.scalars_are_sums = False
        self.counts_first_labels = False
        self.counts_weights = False
        self._accelerator: Callable[[], Any] = lambda: None

    def install(self, accelerator: Any) -> None:
        """Replace methods of the accelerator that the Trainer or loop will use."""
        # A weak reference: this object outlives the Trainer, whose model and optimizer must be freed.
        self._accelerator = weakref.ref(accelerator)
        accelerator.pad_across_processes = self.pad_across_processes
        accelerator.gather_for_metrics = self.gather_for_metrics
        accelerator.backward = self.backward

    # In the backward pass

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run the backward pass, or only capture the loss during a trial step.

        Args:
            loss: a scalar.

        Raises:
            ValueError: on every rank, if the ranks did not train the model's loss alike (see `loss_monitor.py`).
        """
        if runtime_state.captured_losses is not None:
            runtime_state.captured_losses.append(loss)
            return
        scales: list[torch.Tensor] = []  # factors by which the engine multiplies the loss
        handle = loss.register_hook(lambda gradient: scales.append(gradient.detach()))

        def compare() -> None:
            message = runtime_state.loss_monitor.record_backward(loss, scales[0])
            if message is None:
                return
            messages = exchange_messages(message, loss.device)
            raise_if_not_finite(messages, loss.device)
            error = find_loss_mismatch(messages, self.context)
            if error is not None:
                raise ValueError(error)

        if ENGINES[self.context.engine].is_deepspeed:
            with _compare_before_step(self._accelerator().deepspeed_engine_wrapped.engine, compare) as has_compared:
                self._call_original("backward", loss, **kwargs)
        else:
            self._call_original("backward", loss, **kwargs)
            has_compared = []
        handle.remove()
        if not has_compared:
            compare()

    # Around the forward pass of the model

    def check_batch(self, batch: Any) -> str | None:
        """Return an error message if this evaluation cannot equal that of one process, else None."""
        loader = GradientState().active_dataloader
        if loader is None or self.context.num_replicas == 1:
            return None
        if isinstance(loader.dataset, IterableDataset):
            return (
                f"An evaluation dataset without a length cannot be split exactly over {self.context.num_replicas} "
                "replicas: the rows that fill up the last batch cannot be identified. Use a map-style dataset, or "
                "dp_replicate_size=1."
            )
        if self._num_real_examples() is not None and getattr(batch, "examples", None) == ():
            return (
                "The last evaluation batch repeats examples to fill all replicas, and the rows of the inner collator "
                "do not show where examples begin. Evaluate a dataset whose length is a multiple of the batch size, "
                "or use dp_replicate_size=1."
            )
        return None

    def prepare_inputs(self, batch: ContextParallelMetadata, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the model's arguments for an evaluation batch.

        Args:
            kwargs: the arguments of this rank, with tensors of shape [B, C].

        Returns:
            The same, but if they have labels, `shift_labels` ([B, C]) of repeated examples are masked, and
            `num_items_in_batch` (a scalar) counts the targets of all ranks.
        """
        runtime_state.evaluation_batch = batch
        shift_labels_BC = kwargs.get("shift_labels")
        if shift_labels_BC is None or kwargs.get("labels") is None:
            return kwargs
        shift_labels_BC = self._mask_repeated(shift_labels_BC, batch)
        is_target_BC = shift_labels_BC != IGNORE_INDEX
        # If the caller passed no count, the loss is a mean over targets, weighted by `loss_weights`.
        is_weighted_mean = self.counts_weights or kwargs.get("num_items_in_batch") is None
        weights_BC = kwargs.get("loss_weights") if is_weighted_mean else None
        count = is_target_BC.sum() if weights_BC is None else (weights_BC * is_target_BC).sum()
        if self.counts_first_labels and weights_BC is None and batch.sequence.segments(batch.rank)[0].start == 0:
            count = count + (kwargs["labels"][: self._num_real_examples(), 0] != IGNORE_INDEX).sum()
        return {**kwargs, "shift_labels": shift_labels_BC, "num_items_in_batch": self._sum_over_ranks(count)}

    def combine_losses(self, loss_of_rank: torch.Tensor, scaled_by_trainer: bool) -> torch.Tensor:
        """Return the loss of the whole batch over all ranks.

        Args:
            loss_of_rank: a scalar, the sum over this rank's targets divided by the number of targets of all ranks.
            scaled_by_trainer: whether the Trainer will multiply the result by the number of processes, so that it
                has to be divided here.
        """
        total = self._sum_over_ranks(loss_of_rank.detach())
        return total / (self.context.size * self.context.num_replicas) if scaled_by_trainer else total

    def mean_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a scalar over all ranks, with the same bits on every rank."""
        return self._sum_over_ranks(value.detach()) / (self.context.size * self.context.num_replicas)

    def _sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a scalar over all ranks, added in the same order and thus with the same bits on each."""
        for group in (self.context.group, self.context.replica_group):
            if group is not None:
                value = torch.stack(all_gather(value, group)).sum()
        return value

    def _num_real_examples(self) -> int | None:
        """Return how many of this rank's examples are not repetitions, or None if none of them is."""
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
        token_index = [token for segment in batch.sequence.segments(batch.rank) for token in segment.range]
        start_index = batch.examples[num_real] - 1  # this token would predict the first one of a repeated example
        is_repeated_C = torch.tensor(token_index, device=shift_labels_BC.device) >= start_index
        return shift_labels_BC.masked_fill(is_repeated_C, IGNORE_INDEX)

    # Called by the Trainer on losses, logits and labels

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Restore whole rows from shards, then pad to the same length in all replicas as Accelerate does.

        Args:
            tensor: tensors of shape [B, C, ...], nested in tuples, lists and dicts. Tensors without C tokens along
                dim 1 are not sharded.
            dim: the dim to pad. Rows are restored if it is 1.

        Returns:
            The same nested structure, with tensors of shape [B, S, ...] without the padding of the layout.

        Raises:
            ValueError: if packed rows would have to be ordered over several replicas, or the config of another
                Trainer is active.
        """
        if runtime_state.evaluation_batch is not None and dim == 1:
            tensor = recursively_apply(self._gather_whole_rows, tensor, error_on_other_type=True)
        return self._call_original("pad_across_processes", tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def _gather_whole_rows(self, shard: torch.Tensor) -> torch.Tensor:
        batch = runtime_state.evaluation_batch
        assert batch is not None
        self._check_active_config()
        if shard.ndim < 2 or shard.shape[1] != batch.shard_length:
            return shard
        if batch.examples is not None and self.context.num_replicas > 1:
            raise ValueError(
                f"Predictions of packed rows cannot be ordered over {self.context.num_replicas} data-parallel "
                "replicas. Set prediction_loss_only=True without include_for_metrics, use dp_replicate_size=1, or "
                "pad rows instead of packing them."
            )
        segments = [batch.sequence.segments(rank) for rank in range(batch.sequence.num_ranks)]
        whole = join(all_gather(shard.contiguous(), self.context.group), segments, 1)
        return whole[:, : batch.unpadded_length]

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather over replicas, in the order of the dataset and without repeated examples.

        Args:
            input_data: tensors of shape [B, ...] or scalars, nested in tuples, lists and dicts, with the same values
                on all ranks that share a sequence.

        Returns:
            The same nested structure, with the rows of all replicas along dim 0.

        Raises:
            ValueError: on every rank of a group, if its ranks hold different values; if objects are to be gathered;
                or if the config of another Trainer is active.
        """
        if self.scalars_are_sums and isinstance(input_data, torch.Tensor) and input_data.ndim == 0:
            # Also in training: Accelerate cuts what it gathers with the last batch of an epoch to a number of rows.
            return self._call_original("gather", input_data)
        if runtime_state.evaluation_batch is None:
            return self._call_original("gather_for_metrics", input_data, use_gather_object=use_gather_object)
        if use_gather_object:
            raise ValueError(
                "Gathering objects (eval_use_gather_object=True) is not supported with context parallelism. Set it "
                "to False."
            )
        return recursively_apply(self._gather_over_replicas, input_data, error_on_other_type=True)

    def _call_original(self, method: str, *args: Any, **kwargs: Any) -> Any:
        accelerator = self._accelerator()
        assert accelerator is not None, "called after the accelerator was freed"
        return getattr(type(accelerator), method)(accelerator, *args, **kwargs)

    def _check_active_config(self) -> None:
        """Raise if a Trainer with other sizes was created later: its config sharded the batches."""
        current = process.current()
        own_sizes = (self.context.size, self.context.num_replicas)
        if current is not None and (current.size, current.num_replicas) == own_sizes:
            return
        raise ValueError(
            f"This Trainer shares sequences among {self.context.size} ranks, but the Trainer that was created last "
            f"among {1 if current is None else current.size}. Evaluate a Trainer before you create another one with "
            "another ContextParallelConfig, or create it again."
        )

    def _gather_over_replicas(self, tensor: torch.Tensor) -> torch.Tensor:
        self._check_active_config()
        tensor = tensor[None] if tensor.ndim == 0 else tensor.contiguous()
        sums = torch.stack(all_gather(_checksum(tensor), self.context.group))
        if not bool((sums == sums[0]).all()):
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} differs between ranks that share a sequence, so it was "
                "computed from shards and cannot be restored. The Trainer's own evaluation loop passes whole rows to "
                "compute_metrics and preprocess_logits_for_metrics. In a custom loop, set prediction_loss_only=True."
            )
        group = self.context.replica_group
        gathered = tensor if group is None else torch.cat(all_gather(tensor, group))
        state = GradientState()
        if state.end_of_dataloader and state.remainder > 0:
            gathered = gathered[: state.remainder]
        return gathered


@contextlib.contextmanager
def _compare_before_step(engine: Any, compare: Callable[[], None]) -> Iterator[list[bool]]:
    """Call `compare` before the optimizer step, with which the backward pass of a DeepSpeed engine may end.

    Yield a list that is empty as long as `compare` was not called.
    """
    step = engine.step
    has_compared: list[bool] = []

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
    """Set the evaluator of this process. It is current as long as its context is."""
    global _active
    _active = evaluator


def current_evaluator() -> Evaluator | None:
    """Return the evaluator of the current context, or None where sequences are whole."""
    return _active if _active is not None and _active.context is process.current() else None


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return two sums and the size, an fp64 tensor of shape [3].

    Ranks that share a sequence have computed the same bits, so their checksums must be equal.
    """
    flat = tensor.detach().flatten()
    sums = [flat.sum(dtype=torch.double), flat[::3].sum(dtype=torch.double)]
    size = torch.tensor(float(flat.numel()), dtype=torch.double, device=flat.device)
    return torch.nan_to_num(torch.stack([*sums, size]))
