"""The collator that shards: it prepares a whole batch and returns this rank's shard of it.

An inner collator makes the plain batch. Then the labels are shifted (globally, before anything is cut), documents and
padding are detected, the rows are padded to a multiple that the layout can cut, and this rank's segments are taken.
`ContextParallelMetadata` carries the facts about the whole sequence that a shard does not contain. Without context
parallelism the inner batch is returned unchanged, so the same script runs in one process. (There are two exceptions:
a plain batch cannot carry prefixes, so one process gets metadata, too; and packed rows with padding lose their mask,
with which Transformers would not see their documents.)

To the Trainer a shard is a batch with target tokens of its own, so its token-weighted mean of the loss over ranks is
exact without changes. (That is why the config keeps Accelerate's `cp_size` at 1: the Trainer would divide the token
count by it.)

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
from ..checks.argument_rules import check_loss_weights
from ..checks.padded_targets import check_padded_targets
from ..degrees import resolve_degrees
from ..documents import (
    Documents,
    documents_from_cu_seq_lens,
    documents_from_position_ids,
    num_real_tokens,
    shift_left,
    shift_right,
    without_padding_mask,
)
from .default_collator import PadOrPackCollator
from .prefix_lm import (
    PrefixLengths,
    count_targets_in_prefixes,
    pop_prefix_lengths,
    prefixes_per_document,
    refuse_prefix_column,
)

logger = logging.getLogger(__name__)

# Used where a batch needs metadata (prefixes) although this process holds whole sequences.
SINGLE_PROCESS = process.ProcessContext(size=1, rank=0, num_replicas=1, replica=0, group="", replica_group=None)

PER_TOKEN_KEYS = ("input_ids", "labels", "shift_labels", "loss_weights", "attention_mask", "position_ids", "seq_idx")
PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
NON_TOKEN_KEYS = (
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
        model_or_config: the model to train (or its config): its attention implementation selects the layout.
        inner: any collator that returns right-padded or packed tensors; default: pad on the right, or pack.
        packing: with the default inner collator, concatenate the examples into one row with document boundaries.
        pad_token_id: default: the config's, or 0 (padding is neither attended to nor predicted).
        prefix_lm: read the column `prefix_length` of every example: attention is bidirectional among its first tokens
            (set remove_unused_columns=False, or the Trainer drops the column).

    A column `loss_weights`, one number per label (of shift_labels if the batch has them), weights the tokens in a loss
    that is computed in blocks (`ring_hf.memory.apply`; it needs remove_unused_columns=False, too). With other losses,
    which would ignore it, it is refused (in one process, only if the collator was given the model, not its config).

    Documents are read from `cu_seq_lens_q`, else from `position_ids` that restart, with or without an attention mask
    of ones.

    Raises:
        ValueError: if both `inner` and `packing` are given.
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
                "packing=True belongs to the default collator, but inner= was given. Let the inner collator pack "
                "(for example transformers.DataCollatorWithFlattening), or leave inner out."
            )
        model = model_or_config.get_base_model() if hasattr(model_or_config, "get_base_model") else model_or_config
        self._config = getattr(model, "config", model)
        self._model = weakref.ref(model) if isinstance(model, torch.nn.Module) else None
        if pad_token_id is None:
            pad_token_id = getattr(self._config, "pad_token_id", None)
        self._pad_token_id = _valid_pad_token_id(pad_token_id, self._config)
        self.inner = inner if inner is not None else PadOrPackCollator(packing, self._pad_token_id)
        self.prefix_lm = prefix_lm
        self._warned = False
        self._pickled_context: process.ProcessContext | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the process context, too: a spawned loader worker has none of its own."""
        return {**self.__dict__, "_pickled_context": self._context(), "_model": None}

    def _context(self) -> process.ProcessContext | None:
        return process.current() or self._pickled_context

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """Return the batch of this rank: tensors [B, C] by key, and the metadata under `METADATA_KEY`.

        With several ranks, an invalid batch is returned as `InvalidBatch` instead of raised: an error, perhaps in a
        loader worker of one rank only, would leave the other ranks waiting. The model raises it on all ranks.

        Raises:
            ValueError: in one process, if the batch is invalid; or if `return_tensors` is not "pt".
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(
                f"return_tensors={return_tensors!r}: only PyTorch tensors ('pt') are supported. Leave it out."
            )
        context = self._context()
        if context is None or context.size == 1:
            batch = self._collate_whole(features)
            self._refuse_padded_targets(batch)
            model = self._model() if self._model is not None and batch.get("loss_weights") is not None else None
            if model is not None and (error := check_loss_weights(model)) is not None:
                raise ValueError(error)
            return self._with_documents(batch)
        try:
            return self._collate_shard(features, context)
        except ValueError as error:
            logger.warning("batch refused: %s", error)
            labels = torch.full((max(len(features), 1), 1), IGNORE_INDEX)
            return {
                "input_ids": torch.zeros_like(labels),
                "labels": labels,
                "shift_labels": labels.clone(),
                METADATA_KEY: InvalidBatch(str(error)),
            }

    def _refuse_padded_targets(self, batch: Mapping[str, Any]) -> None:
        """Raise if a ring backend in one process would have to predict from padding, as with several processes."""
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if attention_name(self._config) not in BACKENDS or mask is None or labels is None or mask.ndim != 2:
            return
        error = check_padded_targets(batch.get("shift_labels", shift_left(labels)), mask)
        if error is not None:
            raise ValueError(error)

    def _with_documents(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a whole batch whose documents do not attend to each other, also if its rows are padded."""
        separated = batch if METADATA_KEY in batch else without_padding_mask(batch)
        if "attention_mask" in batch and "attention_mask" not in separated:
            text_config = self._config.get_text_config() if hasattr(self._config, "get_text_config") else self._config
            if getattr(text_config, "output_router_logits", False):
                raise ValueError(
                    "Packed rows with padding and output_router_logits=True in one process: without its attention "
                    "mask the model would count padding in the auxiliary loss, and with it documents would attend to "
                    "each other. Use a batch size of 1, or set model.config.output_router_logits = False."
                )
        return separated

    def _collate_whole(self, features: Sequence[Any]) -> dict[str, Any]:
        """Return the batch of a process that holds whole sequences."""
        if not self.prefix_lm:
            refuse_prefix_column(features)
            return dict(self.inner(list(features)))
        if attention_name(self._config) not in BACKENDS:
            raise ValueError(
                f"prefix_lm=True with attn_implementation={attention_name(self._config)!r}, which would ignore the "
                f"prefixes. Set attn_implementation to one of {', '.join(BACKENDS)}, also for one process."
            )
        text_config = self._config.get_text_config() if hasattr(self._config, "get_text_config") else self._config
        if getattr(text_config, "output_router_logits", False):
            raise ValueError(
                "prefix_lm=True with output_router_logits=True in one process: the model would count padding in the "
                "auxiliary loss, which only ranks that share a sequence leave out. Set "
                "model.config.output_router_logits = False."
            )
        return self._collate_shard(features, SINGLE_PROCESS)

    def _collate_shard(self, features: Sequence[Any], context: process.ProcessContext) -> dict[str, Any]:
        degrees = resolve_degrees(self._config, context)
        prefix_lengths: tuple[int, ...] | None = None
        if self.prefix_lm:
            features, prefix_lengths = pop_prefix_lengths(features)
        else:
            refuse_prefix_column(features)
        batch = dict(self.inner(list(features)))
        _refuse_unsupported_keys(batch)
        num_rows, length = batch["input_ids"].shape
        mask = batch.get("attention_mask")
        num_tokens = None if mask is None else num_real_tokens(mask)
        documents = _document_boundaries(batch, num_tokens)
        tensors = _whole_tensors(batch)
        if mask is not None and "shift_labels" in tensors:
            error = check_padded_targets(tensors["shift_labels"], mask)
            if error is not None:
                raise ValueError(error)
        examples = _example_boundaries(features, num_rows, length)
        prefixes = None
        if prefix_lengths is not None:
            prefixes = prefixes_per_document(prefix_lengths, num_rows, length, documents, num_tokens, examples)
            self._warn_of_visible_targets(tensors, documents, prefixes)
            prefixes = prefixes if max(prefix_lengths) > 1 else None  # a prefix of one token is causal
        fingerprint = _fingerprint(tensors, (documents, prefixes))

        padded = padded_length(degrees.layout, length, degrees.size, degrees.ulysses_size)
        tensors = {key: _pad_to(tensor, padded, self._padding_value(key)) for key, tensor in tensors.items()}
        if padded > length:
            num_tokens = num_tokens or (length,) * num_rows
            if documents is not None:
                documents = tuple((*row, padded) for row in documents)
                prefixes = prefixes and tuple((*row, 0) for row in prefixes)
        sequence = ShardedSequence(
            degrees.layout,
            padded,
            degrees.size,
            documents,
            num_tokens,
            prefixes=prefixes,
            ulysses=degrees.ulysses_size,
        )
        metadata = ContextParallelMetadata(
            sequence=sequence,
            group=context.group,
            rank=context.rank,
            options=degrees.options,
            unpadded_length=length,
            examples=examples,
            fingerprint=fingerprint,
        )
        segments = sequence.segments(context.rank)
        shard: dict[str, Any] = {key: cut(tensor, segments, 1) for key, tensor in tensors.items()}
        shard[METADATA_KEY] = metadata
        return shard

    def _warn_of_visible_targets(
        self, tensors: Mapping[str, torch.Tensor], documents: Documents | None, prefixes: PrefixLengths
    ) -> None:
        """Log once per collator if labels lie inside prefixes."""
        if self._warned or "shift_labels" not in tensors:
            return
        count = count_targets_in_prefixes(tensors["shift_labels"], documents, prefixes)
        if count:
            self._warned = True
            logger.warning(
                "%d targets lie inside prefixes, where the model sees the token that it predicts. Set the labels of "
                "prefix tokens to %d.",
                count,
                IGNORE_INDEX,
            )

    def _padding_value(self, key: str) -> int | None:
        """Return the value to pad a tensor with; None: count from 0."""
        return {"input_ids": self._pad_token_id, "position_ids": None, "loss_weights": 0}.get(key, IGNORE_INDEX)


def _valid_pad_token_id(token_id: Any, config: Any) -> int:
    """Return `token_id` if the embedding has it, else 0: padding is neither attended to nor predicted."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab_size = getattr(text_config, "vocab_size", None)
    is_valid = isinstance(token_id, int) and token_id >= 0 and (vocab_size is None or token_id < vocab_size)
    return token_id if is_valid else 0


def _refuse_unsupported_keys(batch: Mapping[str, Any]) -> None:
    """Raise if the inner batch has a key or a shape that cannot be sharded."""
    non_tokens = [key for key in NON_TOKEN_KEYS if batch.get(key) is not None]
    if non_tokens:
        raise ValueError(
            f"The batch contains {', '.join(non_tokens)}: only token ids can be sharded, not embeddings, images or "
            "audio. Remove these columns."
        )
    if "input_ids" not in batch:
        raise ValueError(
            f"The inner collator returned no input_ids, only {sorted(batch)}. Use a collator that returns token ids."
        )
    unknown_keys = sorted(set(batch) - {*PER_TOKEN_KEYS, *PACKING_KEYS})
    if unknown_keys:
        raise ValueError(
            f"The batch contains {', '.join(unknown_keys)}, which ContextParallelCollator does not know how to shard. "
            "Remove it from the dataset or in the inner collator."
        )
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids has shape {shape}, but must be 2D: rows of tokens.")
    positions = batch.get("position_ids")
    if positions is not None and positions.ndim == 3:
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} (multimodal RoPE) cannot be sharded. Pass 2D "
            "position_ids, or none."
        )
    for key in ("labels", "shift_labels", "loss_weights", "position_ids", "seq_idx"):
        value = batch.get(key)
        is_broadcast = key == "position_ids" and value is not None and tuple(value.shape) == (1, shape[1])
        if value is not None and tuple(value.shape) != shape and not is_broadcast:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, but input_ids has shape {shape}. {key} must have one value "
                "per token."
            )
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2 and tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but input_ids has shape {shape}. They must be equal."
        )


def _document_boundaries(batch: Mapping[str, Any], num_tokens: tuple[int, ...] | None) -> Documents | None:
    num_rows, length = batch["input_ids"].shape
    boundaries = batch.get("cu_seq_lens_q")
    if boundaries is not None:
        if num_rows != 1:
            raise ValueError(
                f"cu_seq_lens_q describes one flattened row, but the batch has {num_rows} rows. Use position_ids that "
                "restart to mark the documents of several rows."
            )
        key_boundaries = batch.get("cu_seq_lens_k")
        if key_boundaries is not None and key_boundaries.tolist() != boundaries.tolist():
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ, but must be equal for self-attention.")
        return documents_from_cu_seq_lens(boundaries, length)
    positions = batch.get("position_ids")
    if positions is None:
        return None
    has_mask = "attention_mask" in batch
    return documents_from_position_ids(positions.expand(num_rows, -1), num_tokens, skips_start_documents=not has_mask)


def _whole_tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of the whole rows, [B, S]: tokens, positions, and if the batch has any, both kinds of labels
    and the weights of shift_labels."""
    num_rows, length = batch["input_ids"].shape
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    tensors = {"input_ids": batch["input_ids"], "position_ids": positions.expand(num_rows, -1)}
    labels, shift_labels = batch.get("labels"), batch.get("shift_labels")
    if shift_labels is None and labels is not None:
        shift_labels = shift_left(labels)
    if shift_labels is not None:
        tensors["shift_labels"] = shift_labels
        tensors["labels"] = shift_right(shift_labels) if labels is None else labels
    weights = batch.get("loss_weights")
    if weights is not None:
        tensors["loss_weights"] = weights if "shift_labels" in batch else pad(weights, (0, 1))[:, 1:]
    return tensors


def _fingerprint(tensors: Mapping[str, torch.Tensor], boundaries: Any) -> str:
    """Return a hash of the unsharded batch, which must be equal on all ranks that share a sequence."""
    digest = hashlib.blake2b(repr(boundaries).encode(), digest_size=16)
    for key in sorted(tensors):
        digest.update(f"{key}{tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _example_boundaries(features: Sequence[Any], num_rows: int, length: int) -> tuple[int, ...] | None:
    """Return the boundaries of the examples in one row, by which evaluation weights them.

    None if every row is one example; empty if the boundaries are unknown.
    """
    if num_rows == len(features):
        return None
    boundaries = [0]
    for feature in features if num_rows == 1 else ():
        if isinstance(feature, Mapping) and "input_ids" in feature:
            boundaries.append(boundaries[-1] + len(feature["input_ids"]))
    return tuple(boundaries) if len(boundaries) == len(features) + 1 and boundaries[-1] == length else ()


def _pad_to(value_BS: torch.Tensor, length: int, padding_value: int | None) -> torch.Tensor:
    """Pad rows on the right to `length` tokens. Without a value, pad with 0, 1, 2, ...: positions of padding then stay
    inside the tables of a model."""
    num_missing = length - value_BS.shape[1]
    if num_missing == 0:
        return value_BS
    if padding_value is not None:
        return pad(value_BS, (0, num_missing), value=padding_value)
    tail = torch.arange(num_missing, dtype=value_BS.dtype).expand(value_BS.shape[0], -1)
    return torch.cat([value_BS, tail], dim=1)
