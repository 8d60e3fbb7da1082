"""Attention of a process that holds the whole sequence: the ring backends without context parallelism.

It must equal `attn_implementation="sdpa"` (or "eager", if softcap or sinks leave a model no other), so that one script
and one checkpoint run with and without context parallelism. The common case is torch's own SDPA call. Packed
documents, windows, chunks, softcap, sinks and chunked prefill go through `ring_hf.parallel.local_attention`, which
never builds an S x S mask.

Documents are found as Transformers finds them for `sdpa`: padding from the 2D mask (which holds document numbers for
packed rows, see `backend.mask_2d`); without a mask and without a cache, a document starts wherever `position_ids` does
not increase by one. (Transformers ignores restarting positions if there is also a mask of ones; here they count in
both cases, as they do with context parallelism.)

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dim, E value head dim.
"""

from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from ring_hf.geometry import AttentionSpec
from ring_hf.parallel import local_attention

from ..documents import Documents, documents_from_cu_seq_lens, documents_from_position_ids


def local_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    dropout: float,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention `[B, S, H, E]` of `query [B, H, Q, D]`, `key [B, K, S, D]` and `value [B, K, S, E]`.

    Args:
        mask_BS: padding mask or document numbers of the keys, see `backend.mask_2d`.
        position_ids, cu_seq_lens: where documents start, if there is no mask.

    Raises:
        ValueError: for 4D masks, masks with holes, and attention dropout that SDPA does not compute.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    plain = spec.softcap is None and sinks is None  # SDPA computes it, but for the mask
    if mask_BS is not None and (mask_BS.ndim != 2 or mask_BS.shape[1] != kv_len):
        raise ValueError(
            f"The ring backends take a 2D padding mask of {kv_len} tokens, got shape {tuple(mask_BS.shape)}. "
            'Use attn_implementation="sdpa" for hand-made 4D masks.'
        )
    if spec.window is not None and spec.window >= kv_len:
        spec = replace(spec, window=None)
    if spec.chunk is not None and spec.chunk >= kv_len:
        spec = replace(spec, chunk=None)
    if q_len == 1 and kv_len > 1 and plain:
        return _decode(query, key, value, mask_BS, spec, dropout)
    documents = _documents(mask_BS, q_len, kv_len, spec.causal, query.shape[0], position_ids, cu_seq_lens)
    whole = documents is None and spec.window is None and spec.chunk is None
    if whole and plain and (q_len == kv_len or not spec.causal):
        causal = spec.causal and q_len > 1
        out_BHSE = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=spec.scale, enable_gqa=True
        )
        return out_BHSE.transpose(1, 2).contiguous()
    if dropout > 0:
        raise ValueError(
            f"attention dropout {dropout} with packed documents, padding, a sliding window, softcap or sinks is not "
            "supported by the ring backends. Set config.attention_dropout = 0.0."
        )
    out_BHSE, _ = local_attention(query, key, value, documents=documents, sinks=sinks, **vars(spec))
    return out_BHSE.transpose(1, 2).contiguous()


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_BS: torch.Tensor | None,
    spec: AttentionSpec,
    dropout: float,
) -> torch.Tensor:
    """Attention of one query at the end of the keys: it sees every real key inside the window."""
    assert spec.chunk is None, "mask_2d refuses caches beyond one chunk"
    visible = None
    kv_len = key.shape[2]
    if mask_BS is not None:
        visible = mask_BS.bool()[:, None, None, :]
    if spec.window is not None:
        inside = torch.arange(kv_len, device=key.device) >= kv_len - spec.window
        visible = inside[None, None, None, :] if visible is None else visible & inside
    out_BHSE = scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, scale=spec.scale, enable_gqa=True
    )
    return out_BHSE.transpose(1, 2).contiguous()


def _documents(
    mask_BS: torch.Tensor | None,
    q_len: int,
    kv_len: int,
    causal: bool,
    num_rows: int,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> Documents | None:
    if mask_BS is not None and mask_BS.dtype == torch.int64 and bool((mask_BS > 0).all()):  # document numbers
        starts = (row.diff().nonzero().flatten() + 1 for row in mask_BS)
        return tuple((0, *row_starts.tolist(), kv_len) for row_starts in starts)
    if mask_BS is not None:
        return _documents_of_mask(mask_BS, causal)
    if q_len != kv_len:
        return None
    if cu_seq_lens is not None and num_rows == 1:
        return documents_from_cu_seq_lens(cu_seq_lens, kv_len)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != kv_len:
        return None
    return documents_from_position_ids(position_ids.expand(num_rows, -1))


def _documents_of_mask(mask_BS: torch.Tensor, causal: bool) -> Documents | None:
    """Make padding on either side a document of its own; causal attention needs that on the left only."""
    mask = mask_BS.int()
    kv_len = mask.shape[1]
    first_B, num_B = mask.argmax(dim=1), mask.sum(dim=1)
    holes = (mask.diff(dim=1) != 0).sum(dim=1) > (first_B > 0).int() + (first_B + num_B < kv_len).int()
    if bool(holes.any()):
        raise ValueError(
            "The attention mask has zeros between ones. The ring backends support padding at the ends of a row only; "
            'use attn_implementation="sdpa" for masks with holes.'
        )
    if causal and not bool((first_B > 0).any()):
        return None
    rows = []
    for first, num in zip(first_B.tolist(), num_B.tolist(), strict=True):
        rows.append(tuple(sorted({0, first, first + num, kv_len})))
    return tuple(rows)
