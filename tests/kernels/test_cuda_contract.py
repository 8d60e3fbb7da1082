"""The kernels on PyTorch's memory-efficient and cuDNN attention are exact on a CPU in fp64.

As in `test_flash_contract.py`, whole rings run through stand-ins with the schemas, results and peculiarities of the
operators (`tests/support/aten_stand_ins.py`), and are compared with dense attention at 1e-10. The real operators run
on fake CUDA tensors, which shows that shapes, strides and arguments fit; it does not test the numbers of a GPU.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from ring_hf.geometry import LAYOUTS, TRANSPORTS, Tile
from ring_hf.kernels import KERNELS, GatherIndex, cuda_cudnn, cuda_efficient, cuda_flash, flash_varlen
from ring_hf.parallel import local_attention
from ring_hf.verify import random_cases
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.kernels.test_flash_contract import HEADS, MASKS, max_band_difference, problem
from tests.support import aten_stand_ins
from tests.support.aten_stand_ins import ADAPTERS, CALLS, aten_stand_in

LARGE_MASKS = ("causal", "full", "packed-full", "prefix")  # with tiles that cuDNN accepts in these tests


@pytest.fixture(scope="module")
def threads():
    with threads_as_ranks() as run:
        yield run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rings_match_dense_attention_through_every_adapter(adapter, layout, threads):
    checked = 0
    for mask in MASKS:
        CALLS.clear()
        for heads in HEADS:
            with aten_stand_in(adapter) as kernel:
                case = replace(problem(layout, mask, heads), kernel=kernel)
                assert random_cases.worst_difference(case, threads) <= random_cases.BAR, case
                checked += 1
        if adapter == "cuda_efficient":
            assert CALLS["efficient"] and not CALLS["cudnn"] and not CALLS["dense"] and not CALLS["packed"]
        elif mask in LARGE_MASKS:
            assert CALLS["cudnn"]
    assert checked == 24


def test_the_matrix_has_192_rings():
    assert len(ADAPTERS) * len(LAYOUTS) * len(MASKS) * len(HEADS) == 192


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_transport_works_with_every_adapter(adapter, transport, threads):
    with aten_stand_in(adapter) as kernel:
        for mask in ("causal", "packed-window"):
            case = replace(problem("zigzag", mask, "gqa", transport, num_ranks=4), kernel=kernel, sinks=True)
            assert random_cases.worst_difference(case, threads) <= random_cases.BAR, case


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_random_problems_are_exact_through_every_adapter(adapter, threads):
    checked = []
    with aten_stand_in(adapter) as kernel:

        @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
        @given(random_cases.cases())
        def check(case):
            checked.append(case)
            served = replace(case, kernel=kernel, softcap=None)
            assert random_cases.worst_difference(served, threads) <= random_cases.BAR

        check()
    assert len(checked) >= 60


@pytest.mark.parametrize("adapter, max_length", [("cuda_efficient", 8), ("cuda_cudnn", 5)])
def test_every_band_is_exact(adapter, max_length):
    with aten_stand_in(adapter, large=1) as name:
        assert max_band_difference(KERNELS[name], max_length) <= 1e-12


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 4, 4), (1, 4, 1), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rows_and_heads_of_one_are_exact_whatever_their_strides(adapter, shape, threads):
    rows, heads, num_kv = shape
    with aten_stand_in(adapter) as kernel:
        case = replace(problem("zigzag", "causal", "gqa"), kernel=kernel, rows=rows, heads=(heads, num_kv))
        assert random_cases.worst_difference(case, threads) <= random_cases.BAR
    # The same with views that start in the middle of larger tensors and have larger head dims behind them.
    q, k, v = (
        torch.randn(rows, 8, n, 20, dtype=torch.float64)[:, 1:, :, 3:11].transpose(1, 2)
        for n in (heads, num_kv, num_kv)
    )
    results = []
    for name in (adapter, "reference"):
        with aten_stand_in(name):
            leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v)]
            views = [torch.cat([x, x], -1)[..., 1:9] for x in leaves]
            out, lse = local_attention(*views, kernel=name)
            results.append((out, lse, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-12


def test_empty_rows_may_have_lse_minus_infinity_as_in_fa3(threads, monkeypatch):
    with aten_stand_in("cuda_flash") as kernel, monkeypatch.context() as patch:
        patch.setattr(cuda_flash, "activated_implementation", lambda: "FA3")
        original = cuda_flash._ATEN_FORWARD

        def forward(*args, **kwargs):
            out, lse, *others = original(*args, **kwargs)
            return out, lse.masked_fill(lse == torch.inf, -torch.inf), *others

        patch.setattr(cuda_flash, "_ATEN_FORWARD", forward)
        for mask in MASKS:
            case = replace(problem("zigzag", mask, "mla"), kernel=kernel)
            assert random_cases.worst_difference(case, threads) <= random_cases.BAR, case


def test_tiles_of_a_step_are_routed_to_two_kernels_by_their_masks():
    bounds = (0, 3, 8, 40, 64)
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with aten_stand_in("cuda_cudnn", large=24, unit=8) as kernel:
        CALLS.clear()
        local_attention(q, k, v, documents=(bounds,), kernel=kernel)[0].sum().backward()
        assert (CALLS["cudnn"], CALLS["packed"]) == (2, 1)  # forward calls: two long documents, two short
        CALLS.clear()
        local_attention(q, k, v, window=30, kernel=kernel)
        assert (CALLS["cudnn"], CALLS["dense"]) == (0, 1)


LARGE = flash_varlen.MIN_DENSE_QUERIES
# A tile, and whether cuDNN accepts it.
TILES = {
    "full": (Tile(0, 1, 0, LARGE, 0, 2 * LARGE, None, None), True),
    "causal square": (Tile(0, 1, 0, LARGE, 0, LARGE, None, 0), True),
    "causal behind a rectangle": (Tile(0, 1, 0, LARGE, 0, 3 * LARGE, None, 2 * LARGE), True),
    "few queries": (Tile(0, 1, 0, LARGE - 128, 0, LARGE, None, None), False),
    "queries that 128 does not divide": (Tile(0, 1, 0, LARGE + 64, 0, LARGE, None, None), False),
    "keys that 128 does not divide": (Tile(0, 1, 0, LARGE, 0, LARGE + 64, None, None), False),
    "one key": (Tile(0, 1, 0, LARGE, 0, 1, None, None), False),
    "few queries with visible keys": (Tile(0, 1, 0, LARGE, 0, LARGE, None, -128), False),
    "diagonal masked": (Tile(0, 1, 0, LARGE, 0, LARGE, None, -1), False),
    "window": (Tile(0, 1, 0, LARGE, 0, LARGE, -128, 0), False),
    "anticausal": (Tile(0, 1, 0, LARGE, 0, LARGE, 0, None), False),
    "fewer keys than queries": (Tile(0, 1, 0, 2 * LARGE, 0, LARGE, None, 0), False),
}


@pytest.mark.parametrize("name", TILES)
def test_cudnn_accepts_only_large_tiles_without_windows(name):
    tile, expected = TILES[name]
    assert cuda_cudnn.accepts(tile) is expected


# An operator and the number of its results.
OPERATORS = {
    "efficient_forward": (cuda_efficient._ATEN_FORWARD, 4),
    "efficient_backward": (cuda_efficient._ATEN_BACKWARD, 4),
    "cudnn_forward": (cuda_cudnn._ATEN_FORWARD, 9),
    "cudnn_backward": (cuda_cudnn._ATEN_BACKWARD, 3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_stand_ins_have_the_schemas_of_pytorch(name):
    operator, num_results = OPERATORS[name]
    schema = operator._schema
    parameters = inspect.signature(getattr(aten_stand_ins, name)).parameters
    real = [(x.name, x.kwarg_only, x.default_value if x.has_default_value() else None) for x in schema.arguments]
    copied = [
        (x.name, x.kind is x.KEYWORD_ONLY, None if x.default is x.empty else x.default) for x in parameters.values()
    ]
    assert real == copied, f"PyTorch {torch.__version__}: {schema}"
    assert len(schema.returns) == num_results


def _layout(results):
    return [(x.shape, x.stride()) if isinstance(x, torch.Tensor) and x.dim() else None for x in results]


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["efficient", "cudnn"])
def test_stand_ins_return_the_shapes_and_strides_of_pytorch(kind, heads):
    (num_heads, num_kv), (dim, v_dim) = heads, (16, 8)
    num_kv = num_heads if kind == "efficient" else num_kv

    def results(forward, backward, dtype, device):
        def unit_tensor(length, number, width):
            if number == 1:
                return torch.ones(2, 1, length, width, dtype=dtype, device=device)
            return torch.ones(2, length, number, width, dtype=dtype, device=device).transpose(1, 2)

        q, k = unit_tensor(40, num_heads, dim), unit_tensor(44, num_kv, dim)
        v, dout = unit_tensor(44, num_kv, v_dim), unit_tensor(40, num_heads, v_dim)
        options = (None, True, 0.0, False) + ((False,) if kind == "cudnn" else ())
        forward_results = out, lse, *_ = forward(q, k, v, *options, scale=0.3)
        zeros = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        if kind == "cudnn":
            grads = backward(dout, q, k, v, out, lse, *zeros, None, None, None, 40, 44, 0.0, False, scale=0.3)
        else:
            grads = backward(dout, q, k, v, None, out, lse, *zeros, 0.0, [True] * 3 + [False], False, scale=0.3)
        return _layout(forward_results), _layout(grads)

    module = {"efficient": cuda_efficient, "cudnn": cuda_cudnn}[kind]
    with FakeTensorMode():
        real = results(module._ATEN_FORWARD, module._ATEN_BACKWARD, torch.bfloat16, "cuda")
    with aten_stand_in("cuda_cudnn"):
        assert results(module._ATEN_FORWARD, module._ATEN_BACKWARD, torch.float64, "cpu") == real


DTYPES = {
    "cuda_efficient": (torch.float32, torch.float16, torch.bfloat16),
    "cuda_cudnn": (torch.float16, torch.bfloat16),
}
STEPS = {
    "large": [Tile(0, 2, 0, 1024, 0, 1024, None, 0), Tile(0, 2, 1024, 1024, 0, 2048, None, 1024)],
    "small": [Tile(0, 2, 0, 5, 0, 5, None, 0), Tile(0, 1, 5, 9, 5, 9, -3, 0), Tile(0, 2, 0, 40, 0, 44, None, None)],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "adapter, dtype", [(adapter, dtype) for adapter, dtypes in DTYPES.items() for dtype in dtypes], ids=str
)
def test_shapes_and_dtypes_are_right_for_the_operators_of_pytorch(adapter, dtype, heads, step, monkeypatch):
    # Two Python methods require CUDA even for fake tensors; the operators behind them do not.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    index = torch.ops.aten.index.Tensor
    monkeypatch.setattr(GatherIndex, "gather", lambda self, x: index(x.transpose(1, 2), [self.rows_T, self.tokens_T]))
    (num_heads, num_kv), (dim, v_dim) = HEADS[heads]
    kernel = KERNELS[adapter]
    flash_varlen._group_tiles.cache_clear()
    with FakeTensorMode():
        q, k, v, dout, out = (
            torch.empty(2, 2048, number, width, dtype=dtype, device="cuda").transpose(1, 2)
            for number, width in ((num_heads, dim), (num_kv, dim), (num_kv, v_dim), *[(num_heads, v_dim)] * 2)
        )
        lse = torch.empty(2, num_heads, 2048, device="cuda")
        for queries, tile_out, tile_lse in kernel.forward(q, k, v, STEPS[step], 0.3):
            assert tile_out.shape == queries.gather(out).shape and tile_out.dtype == dtype
            assert tile_lse.shape == queries.gather(lse).shape and tile_lse.dtype == torch.float32
        for queries, keys, *grads in kernel.backward(dout, q, k, v, out, lse, STEPS[step], 0.3):
            for tokens, grad, x in zip((queries, keys, keys), grads, (q, k, v), strict=True):
                assert grad.shape == tokens.gather(x).shape and grad.device.type == "cuda"
                is_summed = adapter == "cuda_efficient" and num_heads > num_kv and x is not q
                assert grad.dtype == (torch.float32 if is_summed else dtype)
    flash_varlen._group_tiles.cache_clear()
