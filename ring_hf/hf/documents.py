"""Where documents begin and end in a row of tokens, and the labels that follow from the whole row.

Pure functions on unsharded tensors: everything that must be known before a sequence is cut is computed here. A shard
cannot find a document boundary or its last label by itself.

Shapes: B rows, S tokens.
"""

import torch
from torch.nn.functional import pad

from .batch_metadata import IGNORE_INDEX

Documents = tuple[tuple[int, ...], ...]


def documents_of_positions(
    position_ids_BS: torch.Tensor, num_tokens: tuple[int, ...] | None = None, jumps: bool = True
) -> Documents | None:
    """Boundaries per row, or None if every row is one document.

    A position that does not go on from its neighbour begins a document, as in Transformers' packed-sequence detection.
    With `jumps=False` only positions that go back count (a mask was given: Transformers then allows positions to
    skip). Positions of padding, beyond `num_tokens`, are ignored.
    """
    step = position_ids_BS.diff(dim=1)
    begins_BS = (step != 1) if jumps else (step < 1)
    if num_tokens is not None:
        index = torch.arange(1, position_ids_BS.shape[1], device=position_ids_BS.device)
        begins_BS = begins_BS & (index < torch.tensor(num_tokens, device=index.device)[:, None])
    if not bool(begins_BS.any()):
        return None
    length = position_ids_BS.shape[1]
    return tuple((0, *(row.nonzero().flatten() + 1).tolist(), length) for row in begins_BS)


def documents_of_cu_seq_lens(cu_seq_lens: torch.Tensor, length: int) -> Documents | None:
    """Boundaries of the one row that `cu_seq_lens_q` describes."""
    boundaries = [int(boundary) for boundary in cu_seq_lens.flatten().tolist()]
    if not boundaries or boundaries[0] != 0 or boundaries != sorted(boundaries) or boundaries[-1] > length:
        raise ValueError(
            f"cu_seq_lens_q={boundaries} does not describe a row of {length} tokens. It must begin with 0, grow, and "
            f"end with {length}."
        )
    if boundaries[-1] < length:
        boundaries.append(length)
    boundaries = sorted(set(boundaries))
    return None if len(boundaries) == 2 else (tuple(boundaries),)


def shift_left(labels_BS: torch.Tensor) -> torch.Tensor:
    """Label of the *next* token at every position. Must be done before sharding: a shard does not know its next
    token."""
    return pad(labels_BS, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


def shift_right(shift_labels_BS: torch.Tensor) -> torch.Tensor:
    """Inverse of `shift_left` (the label of the first token, which nothing predicts, is lost)."""
    return pad(shift_labels_BS, (1, 0), value=IGNORE_INDEX)[:, :-1].contiguous()


def num_real_tokens(attention_mask_BS: torch.Tensor) -> tuple[int, ...] | None:
    """Tokens before the right padding of every row, or None without padding; refuses every other mask."""
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
            f"attention_mask holds the values {values[:6]}. Only 0 (padding) and 1 (token) are supported; describe "
            "packed documents by position_ids that restart."
        )
    num_tokens = mask.sum(dim=1)
    if bool((num_tokens == 0).any()):
        raise ValueError(
            f"Row {int((num_tokens == 0).nonzero()[0])} of the batch has no token at all. Drop empty examples."
        )
    step = mask.diff(dim=1)
    if bool((step > 0).any()):
        side = "left padding" if bool((mask[:, 0] == 0).any()) else "zeros between ones"
        raise ValueError(
            f"attention_mask has {side}. Context parallelism supports right padding only: set tokenizer.padding_side "
            "= 'right'."
        )
    return None if bool(mask.all()) else tuple(num_tokens.tolist())
