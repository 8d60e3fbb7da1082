"""A ring whose blocks are all in one process equals dense attention, for every layout, transport and mask."""

import pytest
import torch

from ring_hf.geometry import LAYOUTS, TRANSPORTS, AttentionSpec, Mask, RingOptions, ShardedSequence
from ring_hf.testing import dense_attention, dense_mask, forward_backward
from ring_hf.verify.ring_emulation import Emulation, emulated_attention

LENGTH, ROWS = 56, 2  # shards of 14 tokens, zigzag chunks of 7
DOCUMENTS = ((0, 11, 12, 40, LENGTH), (0, 29, LENGTH))
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "window": Mask(True, 9),
    "chunk": Mask(True, None, 13),
}


def compare(layout, mask, transport="ring", documents=None, ulysses=1, softcap=None, sinks=False, heads=(4, 2)):
    torch.manual_seed(0)
    sequence = ShardedSequence(layout, LENGTH, 4 * ulysses, documents, None, None, ulysses)
    tensors = [
        torch.randn(ROWS, n, LENGTH, d, dtype=torch.float64)
        for n, d in zip((*heads, heads[1]), (8, 8, 6), strict=True)
    ]
    tensors += [torch.randn(heads[0], dtype=torch.float64)] if sinks else []
    dout = torch.randn(ROWS, heads[0], LENGTH, 6, dtype=torch.float64)
    inner = 2 if transport == "double_ring" else 1
    spec = AttentionSpec(**vars(mask), scale=0.3, softcap=softcap)
    emulation = Emulation(sequence, spec, RingOptions(transport, inner, kernel="reference"))
    got = forward_backward(lambda q, k, v, s=None: emulated_attention(q, k, v, emulation, s), *tensors, dout=dout)
    visible = dense_mask(sequence, mask, ROWS)
    want = forward_backward(
        lambda q, k, v, s=None: dense_attention(q, k, v, s, visible_BSS=visible, scale=0.3, softcap=softcap),
        *tensors,
        dout=dout,
    )
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, x, y in zip(names, got, want, strict=False):
        assert (x - y).abs().max() <= 1e-10, name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_ranks_match_dense_attention(layout, transport, mask):
    compare(layout, MASKS[mask], transport, DOCUMENTS if mask in ("causal", "window") else None)


def test_heads_sinks_and_softcap_are_emulated():
    compare("zigzag", Mask(), softcap=5.0, sinks=True)
    compare("zigzag", Mask(), ulysses=2, sinks=True)
    compare("contiguous", Mask(True, 9), ulysses=7, heads=(6, 2))  # a rank without heads


def test_one_rank_is_refused():
    with pytest.raises(ValueError, match=r"num_ranks=1 is no ring. Emulate at least 2 ranks, or call local_attention"):
        Emulation(ShardedSequence("zigzag", 8, 1), AttentionSpec())
