"""Document boundaries of a row of tokens, and the labels that depend on the whole row.

Pure functions of unsharded tensors. They run before a sequence is cut: a shard contains neither the boundaries of the
documents nor the target of its last token.

Shapes: B rows, S tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from .batch_metadata import IGNORE_INDEX

# By row: the index of the first token of each document, then the length of the row.
Documents = tuple[tuple[int, ...], ...]


def documents_from_position_ids(
    position_ids_BS: torch.Tensor, num_tokens: tuple[int, ...] | None = None, skips_start_documents: bool = True
) -> Documents | None:
    """Return the document boundaries of each row, or None if every row is one document.

    A document starts wherever a position does not continue the previous one, as in Transformers' packed-sequence
    detection.

    Args:
        position_ids_BS: integers.
        num_tokens: real tokens of each row, which come first; positions of padding are ignored. None: no padding.
        skips_start_documents: whether a position that skips ahead starts a document, too. False where the batch has
            an attention mask: Transformers then allows positions to skip, and only positions that go back count.
    """
    length = position_ids_BS.shape[1]
    step = position_ids_BS.diff(dim=1)
    is_start_BS = (step != 1) if skips_start_documents else (step < 1)
    if num_tokens is not None:
        index = torch.arange(1, length, device=position_ids_BS.device)
        is_start_BS = is_start_BS & (index < torch.tensor(num_tokens, device=index.device)[:, None])
    if not bool(is_start_BS.any()):
        return None
    return tuple((0, *(row.nonzero().flatten() + 1).tolist(), length) for row in is_start_BS)


def without_padding_mask(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole batch in a form in which one process sees its documents, too.

    Transformers finds packed documents by their positions only where a batch has no attention mask, so in padded rows
    they would attend to each other. Right padding needs no mask: it becomes a document of its own.

    Args:
        batch: `input_ids` [B, S] and others. It is returned as it is if it has no padding or no documents.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is None or positions is None or mask.ndim != 2 or positions.ndim != 2 or bool((mask != 0).all()):
        return dict(batch)
    num_tokens = num_real_tokens(mask)
    positions = positions.expand(mask.shape)
    if num_tokens is None or documents_from_position_ids(positions, num_tokens, skips_start_documents=False) is None:
        return dict(batch)
    index = torch.arange(mask.shape[1], device=mask.device)
    ends = mask.long().sum(1, keepdim=True)
    padded = {**batch, "position_ids": torch.where(index < ends, positions, index - ends)}
    del padded["attention_mask"]
    return padded


def documents_from_cu_seq_lens(cu_seq_lens: torch.Tensor, length: int) -> Documents | None:
    """Return the document boundaries of the one row that `cu_seq_lens_q` describes, or None if it is one document.

    Args:
        cu_seq_lens: integers [documents + 1], the cumulative lengths.
        length: tokens of the row. Tokens after the last boundary become a document of their own.

    Raises:
        ValueError: if the boundaries do not start at 0, decrease, or exceed `length`.
    """
    boundaries = [int(boundary) for boundary in cu_seq_lens.flatten().tolist()]
    if not boundaries or boundaries[0] != 0 or boundaries != sorted(boundaries) or boundaries[-1] > length:
        raise ValueError(
            f"cu_seq_lens_q={boundaries} does not describe a row of {length} tokens. It must start at 0, never "
            f"decrease, and end at {length}."
        )
    if boundaries[-1] < length:
        boundaries.append(length)
    boundaries = sorted(set(boundaries))
    return None if len(boundaries) == 2 else (tuple(boundaries),)


def shift_left(labels_BS: torch.Tensor) -> torch.Tensor:
    """Return the label of the next token at every position, [B, S]; the last is `IGNORE_INDEX`.

    Must run before sharding: a shard does not contain the token after its last one.
    """
    return pad(labels_BS, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


def shift_right(shift_labels_BS: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `shift_left`, [B, S]. The label of the first token, which is never predicted, is lost."""
    return pad(shift_labels_BS, (1, 0), value=IGNORE_INDEX)[:, :-1].contiguous()


def num_real_tokens(attention_mask_BS: torch.Tensor) -> tuple[int, ...] | None:
    """Return the number of tokens before the right padding of each row, or None if no row is padded.

    Raises:
        ValueError: if the mask is not a 2D mask of zeros and ones with right padding only, or hides a whole row.
    """
    if attention_mask_BS.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask_BS.ndim} dims (shape {tuple(attention_mask_BS.shape)}). Only 2D "
            "padding masks can be sharded; describe packed documents by position_ids that restart, or by "
            "cu_seq_lens_q."
        )
    mask = attention_mask_BS.long()
    if bool(((mask != 0) & (mask != 1)).any()):
        values = sorted(set(mask.flatten().tolist()))
        raise ValueError(
            f"attention_mask contains the values {values[:6]}. Only 0 (padding) and 1 (token) are supported; describe "
            "packed documents by position_ids that restart."
        )
    num_tokens = mask.sum(dim=1)
    if bool((num_tokens == 0).any()):
        row = int((num_tokens == 0).nonzero()[0])
        raise ValueError(f"Row {row} of the batch contains no tokens. Drop empty examples from the dataset.")
    step = mask.diff(dim=1)
    if bool((step > 0).any()):
        problem = "left padding" if bool((mask[:, 0] == 0).any()) else "zeros between ones"
        raise ValueError(
            f"attention_mask has {problem}. Context parallelism supports right padding only: set "
            "tokenizer.padding_side = 'right'."
        )
    return None if bool(mask.all()) else tuple(num_tokens.tolist())
