"""The loss of every token of whole windows, from a model whose windows are sharded over ranks.

Each rank computes its shard by ring attention, as in training. The logits of one block of tokens are in memory at a
time. Losses are exchanged, one number per token, so that every rank returns those of all tokens.

B windows of a batch, S tokens of a window, C tokens of this rank, T = B * C, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ring_hf.hf import ContextParallelCollator, context, guard_model
from ring_hf.hf.batch_metadata import IGNORE_INDEX, METADATA_KEY
from ring_hf.memory import lazy_logits
from ring_hf.parallel import all_reduce


class TokenLosses:
    """Computes the loss of every token of a causal language model, in one process or over the ranks of a sequence.

    Args:
        model: in evaluation mode. With several ranks it has a backend of ring_hf, and every rank calls this object
            with the same windows.
        block: tokens whose logits are in memory at once, on each rank.

    Raises:
        ValueError: if the model is in training mode, or `block` is below 1.
    """

    def __init__(self, model: Any, block: int = 1024) -> None:
        if model.training:
            raise ValueError("The model is in training mode: call model.eval() before its losses are measured.")
        if block < 1:
            raise ValueError(f"block={block}: at least one token at a time.")
        self._model, self._block = model, block
        self._collator = ContextParallelCollator(model)
        if context.current() is not None:
            guard_model(model)

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor) -> Tensor:
        """Return the losses in nats, fp64 `[B, S - 1]` on the CPU: column p is that of token p + 1.

        Raises:
            ValueError: on every rank, if the model cannot be computed in shards or ranks hold different windows.
        """
        if context.current() is None:
            targets_BS = pad(ids_BS[:, 1:], (0, 1), value=IGNORE_INDEX)
            return self._losses({"input_ids": ids_BS}, targets_BS)[:, :-1]
        rows = [{"input_ids": row, "labels": row} for row in ids_BS.tolist()]
        batch = self._collator(rows)
        targets_BC = batch.pop("shift_labels")
        batch.pop("labels", None)
        losses_BC = self._losses(batch, targets_BC)
        metadata = batch[METADATA_KEY]
        losses_BS = losses_BC.new_zeros(len(ids_BS), metadata.sequence.length)
        start = 0
        for segment in metadata.sequence.segments(metadata.rank):
            losses_BS[:, segment.slice] = losses_BC[:, start : start + segment.length]
            start += segment.length
        return all_reduce(losses_BS, metadata.group)[:, : ids_BS.shape[1] - 1]

    def _losses(self, batch: dict[str, Any], targets_BC: Tensor) -> Tensor:
        """Return the losses of a batch of this rank, fp64 `[B, C]` on the CPU; 0 where there is no target."""
        device = self._model.device
        tensors = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        head = self._model.get_output_embeddings()
        if head is not None:
            lazy_logits.enable(head, self._block)
        try:
            logits_BCV = self._model(**tensors, use_cache=False).logits
        finally:
            if head is not None:
                lazy_logits.remove(head)
        targets_T = targets_BC.to(device).reshape(-1)
        if isinstance(logits_BCV, lazy_logits.LazyLogits):
            lazy = logits_BCV
            blocks: Iterator[Tensor] = (lazy.logits_of(hidden[None])[0] for hidden in self._split(lazy.hidden))
        else:  # fewer tokens than a block, or a model that changes its logits in a way that needs all of them
            blocks = iter(self._split(logits_BCV))
        losses = [
            cross_entropy(
                logits_bV.to(torch.promote_types(logits_bV.dtype, torch.float32)),
                targets_b,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            ).double()
            for logits_bV, targets_b in zip(blocks, targets_T.split(self._block), strict=True)
        ]
        return torch.cat(losses).view(targets_BC.shape).cpu()

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.flatten(0, -2).split(self._block)
