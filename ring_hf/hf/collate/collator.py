"""The collator that shards: every rank gets its part of a batch that was prepared as a whole.

An inner collator makes the plain batch. Here the labels are shifted (globally, before anything is cut), documents and
padding are found, everything is padded to the layout's multiple, and this rank's segments are taken. What the shard
cannot tell travels beside it as `ContextParallelMetadata`. Without context parallelism the inner batch is returned as
it is, so one script serves both (with prefixes, which no plain batch can carry, it is one shard of one).

To the Trainer a shard is a batch of its own with distinct target tokens, so its token-weighted mean of the loss over
ranks is exact with no change. (That is why the config keeps Accelerate's `cp_size` at 1: the Trainer would divide the
token count by it.)

Shapes: B rows, S tokens of the whole row, C tokens of this rank.
"""

import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ring_hf.geometry import ShardedSequence, padded_length
from ring_hf.parallel import cut

from .. import context as process
from ..attn_names import BACKENDS, attention_name
from ..batch_metadata import IGNORE_INDEX, METADATA_KEY, ContextParallelMetadata, InvalidBatch
from ..checks import padded_targets
from ..checks.argument_rules import check_weights
from ..degrees import resolve_degrees
from ..documents import (
    Documents,
    documents_of_cu_seq_lens,
    documents_of_positions,
    num_real_tokens,
    shift_left,
    shift_right,
)
from .default_collator import PadOrPackCollator
from .prefix_lm import prefixes_of_documents, refuse_column, take_prefixes, targets_inside

logger = logging.getLogger(__name__)

# One process that holds whole sequences, for what only the description of a batch can carry.
SINGLE_PROCESS = process.ProcessContext(size=1, rank=0, num_replicas=1, replica=0, group="", replica_group=None)

PER_TOKEN = ("input_ids", "labels", "shift_labels", "loss_weights", "attention_mask", "position_ids", "seq_idx")
DESCRIPTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
NOT_TOKENS = (
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "input_features",
    "input_values",
)


class ContextParallelCollator:
    """Collates a batch and takes this rank's shard of it.

    Args:
        model_or_config: the model that is trained (or its config): its attention implementation names the layout.
        inner: any collator that returns right-padded or packed tensors; default: pad on the right, or pack.
        packing: with the default inner collator, flatten the examples into one row with document boundaries.
        pad_token_id: for padding; default: the config's, or 0 (padding is never attended to, nor predicted).
        prefix_lm: take the column `prefix_length` of every example: its first tokens see each other both ways (set
            remove_unused_columns=False, or the Trainer drops the column).

    A column `loss_weights`, one number per label (of shift_labels if the batch has them), weighs tokens in a loss that
    is taken in blocks (`ring_hf.memory.apply`; set remove_unused_columns=False here, too). No other loss knows any:
    the column is refused then (in one process if the collator was given the model, not its config).

    Documents are taken from `cu_seq_lens_q`, else from `position_ids` that restart, whether or not an all-ones
    attention mask comes with them.
    """

    def __init__(
        self,
        model_or_config: Any,
        inner: Callable[[list], Mapping[str, Any]] | None = None,
        packing: bool = False,
        pad_token_id: int | None = None,
        prefix_lm: bool = False,
    ):
        if inner is not None and packing:
            raise ValueError(
                "packing=True belongs to the default collator, but inner= was given too. Let the inner collator pack "
                "(for example transformers.DataCollatorWithFlattening), or leave it out."
            )
        model = model_or_config.get_base_model() if hasattr(model_or_config, "get_base_model") else model_or_config
        self._config = getattr(model, "config", model)
        self._model = weakref.ref(model) if isinstance(model, torch.nn.Module) else None
        if pad_token_id is None:
            pad_token_id = getattr(self._config, "pad_token_id", None)
        self._pad_token_id = _valid_padding(pad_token_id, self._config)
        self.inner = inner if inner is not None else PadOrPackCollator(packing, self._pad_token_id)
        self.prefix_lm = prefix_lm
        self._warned = False
        self._sent_context: process.ProcessContext | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A spawned loader worker has no process context of its own: it travels with the collator."""
        return {**self.__dict__, "_sent_context": self._context(), "_model": None}

    def _context(self) -> process.ProcessContext | None:
        return process.current() or self._sent_context

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """The batch of this rank. A batch that cannot be sharded becomes a `InvalidBatch`: raising here, perhaps in a
        loader worker of one rank only, would leave the other ranks waiting."""
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: only PyTorch tensors ('pt') can be sharded.")
        context = self._context()
        if context is None or context.size == 1:
            whole = self._whole(features)
            self._refuse_padded_targets(whole)
            model = self._model() if self._model is not None and whole.get("loss_weights") is not None else None
            if model is not None and (error := check_weights(model)) is not None:
                raise ValueError(error)
            return whole
        try:
            return self._shard(features, context)
        except ValueError as error:
            logger.warning("batch refused: %s", error)
            nothing = torch.full((max(len(features), 1), 1), IGNORE_INDEX)
            empty = {"labels": nothing, "shift_labels": nothing.clone()}
            return {"input_ids": torch.zeros_like(nothing), **empty, METADATA_KEY: InvalidBatch(str(error))}

    def _refuse_padded_targets(self, whole: Mapping[str, Any]) -> None:
        """In one process as with several, a ring backend is not asked for predictions of padding."""
        mask, labels = whole.get("attention_mask"), whole.get("labels")
        if attention_name(self._config) not in BACKENDS or mask is None or labels is None or mask.ndim != 2:
            return
        error = padded_targets.check(whole.get("shift_labels", shift_left(labels)), mask)
        if error is not None:
            raise ValueError(error)

    def _whole(self, features: Sequence[Any]) -> dict[str, Any]:
        """The batch of a process that holds whole sequences."""
        if not self.prefix_lm:
            refuse_column(features)
            return dict(self.inner(list(features)))
        if attention_name(self._config) not in BACKENDS:
            raise ValueError(
                f"prefix_lm=True with attn_implementation={attention_name(self._config)!r}, which would not look at "
                f"the prefixes. Set attn_implementation to one of {', '.join(BACKENDS)}, also for one process."
            )
        text_config = self._config.get_text_config() if hasattr(self._config, "get_text_config") else self._config
        if getattr(text_config, "output_router_logits", False):
            raise ValueError(
                "prefix_lm=True with output_router_logits=True in one process: the model would count padding in the "
                "auxiliary loss, which only the ranks of a shared sequence leave out. Set "
                "model.config.output_router_logits = False."
            )
        return self._shard(features, SINGLE_PROCESS)

    def _shard(self, features: Sequence[Any], context: process.ProcessContext) -> dict[str, Any]:
        split = resolve_degrees(self._config, context)
        taken: tuple[int, ...] | None = None
        if self.prefix_lm:
            features, taken = take_prefixes(features)
        else:
            refuse_column(features)
        batch = dict(self.inner(list(features)))
        _check_keys(batch)
        num_rows, length = batch["input_ids"].shape
        mask = batch.get("attention_mask")
        num_tokens = None if mask is None else num_real_tokens(mask)
        documents = _documents(batch, num_tokens)
        whole = _prepare(batch)
        if (
            mask is not None
            and "shift_labels" in whole
            and (error := padded_targets.check(whole["shift_labels"], mask))
        ):
            raise ValueError(error)
        examples = _examples(features, num_rows, length)
        prefixes = None
        if taken is not None:
            prefixes = prefixes_of_documents(taken, num_rows, length, documents, num_tokens, examples)
            self._warn_of_visible_targets(whole, documents, prefixes)
            prefixes = prefixes if max(taken) > 1 else None  # one token sees itself anyway
        fingerprint = _fingerprint(whole, (documents, prefixes))

        padded = padded_length(split.layout, length, split.size, split.ulysses_size)
        whole = {key: _pad_to(value, padded, self._fill(key)) for key, value in whole.items()}
        if padded > length:
            num_tokens = num_tokens or (length,) * num_rows
            if documents is not None:
                documents = tuple((*row, padded) for row in documents)
                prefixes = prefixes and tuple((*row, 0) for row in prefixes)
        sequence = ShardedSequence(
            split.layout, padded, split.size, documents, num_tokens, prefixes=prefixes, ulysses=split.ulysses_size
        )
        description = ContextParallelMetadata(
            sequence=sequence,
            group=context.group,
            rank=context.rank,
            options=split.options,
            unpadded_length=length,
            examples=examples,
            fingerprint=fingerprint,
        )
        segments = sequence.segments(context.rank)
        return {**{key: cut(value, segments, 1) for key, value in whole.items()}, METADATA_KEY: description}

    def _warn_of_visible_targets(
        self, whole: Mapping[str, torch.Tensor], documents: Documents | None, prefixes: Documents
    ) -> None:
        if self._warned or "shift_labels" not in whole:
            return
        count = targets_inside(whole["shift_labels"], documents, prefixes)
        if count:
            self._warned = True
            logger.warning(
                "%d targets lie inside prefixes, where their own prediction sees them. Set the labels of prefix "
                "tokens to %d.",
                count,
                IGNORE_INDEX,
            )

    def _fill(self, key: str) -> int | None:
        return {"input_ids": self._pad_token_id, "position_ids": None, "loss_weights": 0}.get(key, IGNORE_INDEX)


def _valid_padding(token_id: Any, config: Any) -> int:
    """Return a token that the embedding knows: padding is neither attended to nor predicted, so any will do."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_words = getattr(text_config, "vocab_size", None)
    is_valid = isinstance(token_id, int) and token_id >= 0 and (num_words is None or token_id < num_words)
    return token_id if is_valid else 0


def _check_keys(batch: Mapping[str, Any]) -> None:
    embedded = [key for key in NOT_TOKENS if batch.get(key) is not None]
    if embedded:
        raise ValueError(
            f"The batch holds {', '.join(embedded)}: only token ids can be sharded, not embeddings, images or audio."
        )
    if "input_ids" not in batch:
        raise ValueError(f"The inner collator returned no input_ids, only {sorted(batch)}.")
    unknown = sorted(set(batch) - {*PER_TOKEN, *DESCRIPTION})
    if unknown:
        raise ValueError(
            f"The batch holds {', '.join(unknown)}, and it is not known how that is cut into shards. Remove it from "
            "the dataset or in the inner collator."
        )
    if batch["input_ids"].ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(batch['input_ids'].shape)}; a batch of rows of tokens is needed."
        )
    shape = tuple(batch["input_ids"].shape)
    positions = batch.get("position_ids")
    if positions is not None and positions.ndim == 3:
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} (multimodal RoPE) cannot be sharded. Only 2D "
            "position_ids can."
        )
    for key in ("labels", "shift_labels", "loss_weights", "position_ids", "seq_idx"):
        value = batch.get(key)
        rows_may_be_one = key == "position_ids" and value is not None and tuple(value.shape) == (1, shape[1])
        if value is not None and tuple(value.shape) != shape and not rows_may_be_one:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)} beside input_ids {shape}: one value per token is needed."
            )
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2 and tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)} beside input_ids {shape}: they must be equal.")


def _documents(batch: Mapping[str, Any], num_tokens: tuple[int, ...] | None) -> Documents | None:
    num_rows, length = batch["input_ids"].shape
    boundaries = batch.get("cu_seq_lens_q")
    if boundaries is not None:
        if num_rows != 1:
            raise ValueError(
                f"cu_seq_lens_q describes one flattened row, but the batch has {num_rows} rows. Use position_ids that "
                "restart to mark documents in several rows."
            )
        keys = batch.get("cu_seq_lens_k")
        if keys is not None and keys.tolist() != boundaries.tolist():
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; self-attention needs them equal.")
        return documents_of_cu_seq_lens(boundaries, length)
    positions = batch.get("position_ids")
    if positions is None:
        return None
    return documents_of_positions(positions.expand(num_rows, -1), num_tokens, jumps="attention_mask" not in batch)


def _prepare(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tokens, positions, both kinds of labels and the weights of shift_labels, of the whole rows."""
    num_rows, length = batch["input_ids"].shape
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    whole = {"input_ids": batch["input_ids"], "position_ids": positions.expand(num_rows, -1)}
    labels, shift_labels = batch.get("labels"), batch.get("shift_labels")
    if shift_labels is None and labels is not None:
        shift_labels = shift_left(labels)
    if shift_labels is not None:
        whole["shift_labels"] = shift_labels
        whole["labels"] = shift_right(shift_labels) if labels is None else labels
    weights = batch.get("loss_weights")
    if weights is not None:
        whole["loss_weights"] = weights if "shift_labels" in batch else pad(weights, (0, 1))[:, 1:]
    return whole


def _fingerprint(whole: Mapping[str, torch.Tensor], described: Any) -> str:
    """Hash of the unsharded batch: ranks that share a sequence must have been given the same one."""
    digest = hashlib.blake2b(repr(described).encode(), digest_size=16)
    for key in sorted(whole):
        digest.update(f"{key}{tuple(whole[key].shape)}".encode())
        digest.update(whole[key].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _examples(features: Sequence[Any], num_rows: int, length: int) -> tuple[int, ...] | None:
    """Boundaries of the examples if one row holds several (evaluation weighs by example); empty if they cannot be
    told."""
    if num_rows == len(features):
        return None
    boundaries = [0]
    for feature in features if num_rows == 1 else ():
        if isinstance(feature, Mapping) and "input_ids" in feature:
            boundaries.append(boundaries[-1] + len(feature["input_ids"]))
    return tuple(boundaries) if len(boundaries) == len(features) + 1 and boundaries[-1] == length else ()


def _pad_to(value_BS: torch.Tensor, length: int, fill: int | None) -> torch.Tensor:
    """Rows extended to `length`; without a fill they go on counting from 0, so that no table of positions is
    exceeded."""
    missing = length - value_BS.shape[1]
    if missing == 0:
        return value_BS
    if fill is not None:
        return pad(value_BS, (0, missing), value=fill)
    tail = torch.arange(missing, dtype=value_BS.dtype).expand(value_BS.shape[0], -1)
    return torch.cat([value_BS, tail], dim=1)
