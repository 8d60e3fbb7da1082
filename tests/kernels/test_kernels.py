"""Kernels against dense attention in fp64, the merge, and the choice of a kernel."""

import pytest
import torch

from ring_hf.geometry import AttentionSpec, Mask, RingOptions, ShardedSequence, Tile, split
from ring_hf.kernels import KERNELS, OutLseAccumulator, choose, cpu, merge_
from ring_hf.parallel import local_attention, ring_attention
from ring_hf.testing import assert_close, dense_attention, dense_mask, forward_backward, rms_ratio

ON_CPU = ("cpu", "reference")
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window-1": Mask(window=1),
    "window-2": Mask(window=2),
    "window-7": Mask(window=7),
    "window-30": Mask(window=30),
    "full-window-5": Mask(causal=False, window=5),
}


def tensors(rows=2, heads=4, kv_heads=2, length=37, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, dim))
    # Transposed from BSHD like the projections of a model: not contiguous.
    return [torch.randn(rows, length, h, d, generator=generator, dtype=dtype).transpose(1, 2) for h, d in shapes]


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("documents", [None, ((0, 3, 20, 37), (0, 1, 36, 37))], ids=["dense", "packed"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["mqa", "gqa", "mha"])
def test_kernels_match_dense_attention_in_fp64(kernel, mask, documents, kv_heads):
    q, k, v, dout = tensors(kv_heads=kv_heads)
    visible = dense_mask(ShardedSequence("contiguous", 37, 1, documents), mask, 2)
    want = forward_backward(lambda *x: dense_attention(*x, visible_BSS=visible, scale=0.2), q, k, v, dout=dout)
    settings = {"causal": mask.causal, "window": mask.window, "documents": documents, "scale": 0.2, "kernel": kernel}
    got = forward_backward(lambda *x: local_attention(*x, **settings), q, k, v, dout=dout)
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(name, actual, expected, max_abs=1e-12)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("forward", "backward"), [(9, 5), (2, 30), (1, 1)])
def test_slices_of_long_keys_change_nothing(monkeypatch, mask, forward, backward):
    bytes_per_key = 2 * 8 * 8
    monkeypatch.setattr(cpu, "_FORWARD_SLICE_BYTES", forward * bytes_per_key)
    monkeypatch.setattr(cpu, "_BACKWARD_SLICE_BYTES", backward * bytes_per_key)
    calls = []

    def record_calls(name):
        operator = getattr(cpu, name)

        def recorded(*args, **kwargs):
            calls.append(name)
            return operator(*args, **kwargs)

        monkeypatch.setattr(cpu, name, recorded)

    record_calls("_ATEN_FORWARD")
    record_calls("_ATEN_BACKWARD")
    q, k, v, dout = tensors()
    visible = dense_mask(ShardedSequence("contiguous", 37, 1), mask, 2)
    want = forward_backward(lambda *x: dense_attention(*x, visible_BSS=visible, scale=0.2), q, k, v, dout=dout)
    settings = {"causal": mask.causal, "window": mask.window, "scale": 0.2, "kernel": "cpu"}
    got = forward_backward(lambda *x: local_attention(*x, **settings), q, k, v, dout=dout)
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(name, actual, expected, max_abs=1e-12)
    if mask.window is None:
        assert calls.count("_ATEN_FORWARD") == -(-37 // forward)
        assert calls.count("_ATEN_BACKWARD") == -(-37 // backward)


@pytest.mark.parametrize("queries", [1, 5, 36])
@pytest.mark.parametrize("window", [None, 4])
def test_fewer_queries_than_keys_are_the_last_ones(queries, window):
    q, k, v, _ = tensors()
    visible = dense_mask(ShardedSequence("contiguous", 37, 1), Mask(window=window), 2)
    want, lse = dense_attention(q, k, v, visible_BSS=visible, scale=8**-0.5)
    got, got_lse = local_attention(q[:, :, -queries:], k, v, window=window)
    assert_close("out", got, want[:, :, -queries:], max_abs=1e-12)
    assert_close("lse", got_lse, lse[:, :, -queries:], max_abs=1e-12)


def test_the_cpu_kernel_never_builds_a_mask():
    # A window of 100 over 4,096 tokens: O(tokens x window) pairs in total, and no block above a window squared.
    blocks = split(4096, 4096, -99, 0)
    assert sum(block.count * block.num_q for block in blocks) <= 2 * 4096 + 100
    assert max(block.num_q * block.num_k for block in blocks) <= 100 * 100
    assert len(blocks) < 12


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("v_dim", [5, 8, 12])
@pytest.mark.parametrize("window", [None, 6])
def test_values_may_have_another_head_dim(kernel, v_dim, window):
    q, k, _, _ = tensors()
    v, dout = torch.randn(2, 2, 37, v_dim, dtype=torch.float64), torch.randn(2, 4, 37, v_dim, dtype=torch.float64)
    visible = dense_mask(ShardedSequence("contiguous", 37, 1), Mask(window=window), 2)
    want = forward_backward(lambda *x: dense_attention(*x, visible_BSS=visible, scale=0.3), q, k, v, dout=dout)
    got = forward_backward(lambda *x: local_attention(*x, window=window, scale=0.3, kernel=kernel), q, k, v, dout=dout)
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(name, actual, expected, max_abs=1e-12)


@pytest.mark.parametrize("window", [None, 6])
def test_softcap_and_sinks_match_dense_attention(window):
    q, k, v, dout = tensors()
    sinks = torch.tensor([-2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    visible = dense_mask(ShardedSequence("contiguous", 37, 1), Mask(window=window), 2)
    want = forward_backward(
        lambda *x: dense_attention(*x, visible_BSS=visible, scale=0.3, softcap=0.7), q, k, v, sinks, dout=dout
    )

    def attend(q, k, v, sinks):
        return local_attention(q, k, v, sinks=sinks, window=window, scale=0.3, softcap=0.7)

    got = forward_backward(attend, q, k, v, sinks, dout=dout)
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want, strict=True):
        assert_close(name, actual, expected, max_abs=1e-12)


def test_the_reference_kernel_builds_scores_of_few_queries(monkeypatch):
    q, k, v, dout = tensors()

    def attend(q, k, v):
        return local_attention(q, k, v, window=6, softcap=0.7, kernel="reference")

    want = forward_backward(attend, q, k, v, dout=dout)
    monkeypatch.setattr(KERNELS["reference"], "_MAX_QUERY_ROWS", 5)
    got = forward_backward(attend, q, k, v, dout=dout)
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(name, actual, expected, max_abs=1e-12)


OPTION_REFUSALS = {
    "softcap on cpu": ({"softcap": 2.0, "kernel": "cpu"}, r"kernel='cpu' cannot serve this model: it has no soft-cap"),
    "negative softcap": ({"softcap": -1.0}, r"softcap=-1.0 must be positive"),
    "sinks": ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\), but there are 4 query heads"),
}


@pytest.mark.parametrize("name", OPTION_REFUSALS)
def test_attention_refuses_options_it_does_not_support(name):
    settings, message = OPTION_REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        local_attention(*tensors()[:3], **settings)


@pytest.mark.parametrize(
    "dtype, forward, backward", [(torch.float32, 2e-6, 1e-5), (torch.bfloat16, 5e-3, 1e-2)], ids=str
)
def test_cpu_kernel_keeps_the_accuracy_of_its_dtype(dtype, forward, backward):
    q, k, v, dout = tensors(length=201, dim=16, dtype=dtype)
    visible = dense_mask(ShardedSequence("contiguous", 201, 1), Mask(window=33), 2)
    want = forward_backward(
        lambda *x: dense_attention(*x, visible_BSS=visible, scale=0.25),
        *(x.double() for x in (q, k, v)),
        dout=dout.double(),
    )
    got = forward_backward(lambda *x: local_attention(*x, window=33, scale=0.25, kernel="cpu"), q, k, v, dout=dout)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(name, actual, expected, rms=forward if name in ("out", "lse") else backward)


def test_merge_of_any_split_equals_the_whole():
    torch.manual_seed(0)
    scores, values = torch.randn(3, 40, dtype=torch.float64) * 30, torch.randn(40, 5, dtype=torch.float64)
    out, lse = torch.zeros(3, 5, dtype=torch.float64), torch.full((3,), -torch.inf, dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 17), slice(17, 40)):
        merge_(out, lse, scores[:, part].softmax(-1) @ values[part], scores[:, part].logsumexp(-1))
    assert_close("out", out, scores.softmax(-1) @ values, max_abs=1e-13)
    assert_close("lse", lse, scores.logsumexp(-1), max_abs=1e-13)


def test_merge_with_an_empty_side_keeps_the_other():
    no_out, no_lse = torch.zeros(1, 2), torch.full((1,), -torch.inf)
    out, lse = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    merge_(out, lse, no_out, no_lse)
    assert out.tolist() == [[1.0, 2.0]] and lse.tolist() == [0.5]
    empty_out, empty_lse = no_out.clone(), no_lse.clone()
    merge_(empty_out, empty_lse, no_out, no_lse)
    assert empty_out.tolist() == [[0.0, 0.0]] and empty_lse.item() == -torch.inf
    merge_(empty_out, empty_lse, out, lse)
    assert empty_out.tolist() == [[1.0, 2.0]] and empty_lse.tolist() == [0.5]


def test_merge_is_stable_for_scores_far_apart():
    out, lse = torch.tensor([[1.0]]), torch.tensor([-1e4])
    merge_(out, lse, torch.tensor([[3.0]]), torch.tensor([1e4]))
    assert out.item() == 3.0 and lse.item() == 1e4


def test_rows_without_visible_keys_are_zero_with_lse_minus_infinity():
    output = OutLseAccumulator(torch.zeros(1, 2, 6, 4), 4)
    tile = Tile(0, 1, 2, 4, 0, 4, None, 0)
    q, _, _, _ = tensors(rows=1, heads=2, length=6, dim=4, dtype=torch.float32)
    _, k, v, _ = tensors(rows=1, heads=2, length=4, dim=4, dtype=torch.float32)
    for queries, out, lse in KERNELS["cpu"].forward(q, k, v, [tile], 0.5):
        output.merge(queries, out, lse)
    assert output.out[:, :, :2].abs().max() == 0 and (output.lse[:, :, :2] == -torch.inf).all()
    assert output.lse[:, :, 2:].isfinite().all()


def test_results_are_bitwise_repeatable():
    q, k, v, dout = tensors(length=130, dtype=torch.float32)
    first, second = (forward_backward(lambda *x: local_attention(*x, window=40), q, k, v, dout=dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bf16_errors_are_at_most_twice_those_of_sdpa():
    q, k, v, _ = tensors(length=257, dim=16, dtype=torch.bfloat16)
    visible = dense_mask(ShardedSequence("contiguous", 257, 1), Mask(), 2)
    want, _ = dense_attention(q, k, v, visible_BSS=visible, scale=0.25)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert rms_ratio(local_attention(q, k, v, scale=0.25)[0], want) <= 2 * rms_ratio(sdpa, want)


def _attend(q=None, k=None, v=None, length=37, **settings):
    default_q, default_k, default_v, _ = tensors()
    q = default_q if q is None else q
    k = default_k if k is None else k
    v = default_v if v is None else v
    sequence, options = ShardedSequence("contiguous", length, 1), RingOptions(kernel=settings.pop("kernel", "auto"))
    return ring_attention(q, k, v, sequence=sequence, spec=AttentionSpec(**settings), options=options)


REFUSALS = {
    "kernel": (
        lambda: _attend(kernel="flesh"),
        r"kernel='flesh' is not known\. Choose one of auto, flash_attn, cuda, .*reference, or of the hub ",
    ),
    "dtype": (
        lambda: choose("cpu", torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 1)),
        "torch.int64 is not one of",
    ),
    "any dtype": (
        lambda: choose("auto", *[torch.zeros(1, 1, 1, 1, dtype=torch.int64)] * 2),
        r"No attention kernel fits: .*flash_attn_2: .*; cuda_flash: the tensors are on cpu; .*; cpu: dtype",
    ),
    "device": (lambda: choose("cpu", *[torch.zeros(1, 1, 1, 1, device="meta")] * 2), "the tensors are on meta"),
    "dims": (
        lambda: _attend(q=torch.zeros(2, 37, 8)),
        r"must be \[batch, heads, tokens, head_dim\], got \(2, 37, 8\)",
    ),
    "heads": (
        lambda: _attend(q=torch.zeros(2, 3, 37, 8, dtype=torch.float64)),
        "3 query heads cannot share 2 key/value heads",
    ),
    "pairs": (lambda: _attend(v=torch.zeros(2, 2, 36, 8, dtype=torch.float64)), "do not belong together"),
    "mixed": (lambda: _attend(v=torch.zeros(2, 2, 37, 8)), "must agree in dtype and device"),
    "shard": (
        lambda: _attend(length=40),
        r"holds 37 queries and 37 keys, but its shard of 40 tokens over 1 ranks is 40",
    ),
    "window": (lambda: _attend(window=0), "window=0 must be at least 1"),
    "too many queries": (
        lambda: _attend(q=torch.zeros(2, 4, 38, 8, dtype=torch.float64)),
        "holds 38 queries and 37 keys",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_attention_refuses(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
