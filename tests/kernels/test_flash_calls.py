"""From tiles to launches: packed documents, their indices on the device, PyTorch's operator on fake tensors."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ring_hf.geometry import Tile
from ring_hf.kernels import KERNELS, GatherIndex, cuda_flash, flash_varlen
from ring_hf.parallel import local_attention
from tests.kernels.test_flash_contract import HEADS
from tests.support.flash_stand_ins import CALLS, aten_backward, aten_forward, stand_in

CPU = torch.device("cpu")
SHORT = (Tile(0, 1, 0, 4, 0, 4, None, 0), Tile(0, 1, 4, 9, 4, 9, None, 0), Tile(0, 2, 20, 2, 20, 2, None, 0))


@pytest.fixture
def index_requests(monkeypatch):
    """The arguments of each call that makes index tensors, with an empty cache of launches."""
    requests, original = [], flash_varlen._index_tokens
    monkeypatch.setattr(flash_varlen, "_launch_cache", flash_varlen._LaunchCache(max_tokens=100))
    monkeypatch.setattr(flash_varlen, "_index_tokens", lambda *x: requests.append(x) or original(*x))
    return requests


def test_many_documents_are_one_call_and_large_tiles_are_their_own():
    bounds = (0, 3, 8, 15, 25, 64)
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with stand_in("2.8.3", large=30) as kernel:
        CALLS.clear()
        local_attention(q, k, v, documents=(bounds,), kernel=kernel)[0].sum().backward()
        assert (CALLS["dense"], CALLS["packed"]) == (1, 1)  # of forward


def test_a_short_tile_that_is_alone_is_a_dense_call(index_requests):
    (launch,) = flash_varlen.plan_launches([SHORT[0]], CPU)
    assert launch.varlen is None and not index_requests


def test_a_query_or_key_appears_once_in_a_call():
    tiles = [
        Tile(0, 2, 0, 4, 0, 4, None, None),
        Tile(0, 2, 4, 4, 4, 4, None, None),
        Tile(0, 1, 2, 4, 8, 4, None, None),
    ]
    launches = list(flash_varlen.plan_launches(tiles, CPU))
    num_documents = [len(launch.varlen.cu_seqlens_q) - 1 if launch.varlen else None for launch in launches]
    assert num_documents == [4, None]
    tokens = launches[0].queries
    assert isinstance(tokens, GatherIndex)
    pairs = list(zip(tokens.rows_T.tolist(), tokens.tokens_T.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 16


def test_the_longest_documents_of_a_call_come_first(index_requests):
    (launch,) = flash_varlen.plan_launches(SHORT, CPU)
    assert launch.varlen.cu_seqlens_q.tolist() == [0, 9, 13, 15, 17]


def test_the_second_call_makes_no_indices(index_requests):
    (first,), (second,) = flash_varlen.plan_launches(SHORT, CPU), flash_varlen.plan_launches(list(SHORT), CPU)
    assert first is second and len(index_requests) == 2  # queries and keys
    with stand_in("3-2025-09") as kernel:
        q = torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True)
        num_requests = []
        for _ in range(3):
            local_attention(q, q, q, documents=((0, 3, 8, 15, 40),), kernel=kernel)[0].sum().backward()
            num_requests.append(len(index_requests))
    assert num_requests == [4, 4, 4]  # backward and later layers use the indices of the first forward


def test_a_full_cache_of_indices_drops_the_oldest(index_requests):
    shifted = [[replace(tile, q=tile.q + n, k=tile.k + n) for tile in SHORT] for n in range(10)]
    for tiles in shifted:
        list(flash_varlen.plan_launches(tiles, CPU))
    cache = flash_varlen._launch_cache
    assert len(index_requests) == 20 and len(cache._launches) == 2 and cache._num_tokens == 2 * 34
    list(flash_varlen.plan_launches(shifted[-1], CPU))
    assert len(index_requests) == 20
    list(flash_varlen.plan_launches(shifted[0], CPU))
    assert len(index_requests) == 22


def test_fake_tensors_are_neither_cached_nor_given_real_ones(index_requests):
    (real,) = flash_varlen.plan_launches(SHORT, CPU)
    with FakeTensorMode():
        (fake,) = flash_varlen.plan_launches(SHORT, CPU)
        assert isinstance(fake.varlen.cu_seqlens_q, FakeTensor) and isinstance(fake.queries.rows_T, FakeTensor)
    (cached,) = flash_varlen.plan_launches(SHORT, CPU)
    assert cached is real and type(cached.varlen.cu_seqlens_q) is torch.Tensor


def test_indices_made_in_inference_mode_serve_training(index_requests):
    with torch.inference_mode():
        (launch,) = flash_varlen.plan_launches(SHORT, CPU)
    assert not launch.queries.rows_T.is_inference() and not launch.varlen.cu_seqlens_q.is_inference()


def test_compiling_caches_no_fake_tensor(index_requests):
    q = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    with stand_in("2.8.3") as kernel:
        torch.compile(
            lambda q: local_attention(q, q, q, documents=((0, 3, 8, 40),), kernel=kernel)[0] * 2, backend="aot_eager"
        )(q)
    launches = flash_varlen._launch_cache._launches.values()
    assert launches and all(type(launch.queries.rows_T) is torch.Tensor for launch in launches)


def test_rows_without_visible_keys_get_lse_minus_infinity():
    q = torch.zeros(1, 1, 2, 8)

    def launch_forward(q, k, v, launch, scale, softcap):
        return torch.zeros_like(q), torch.tensor([[[torch.inf, 1.0]]])

    kernel = replace(KERNELS["cuda_flash"], launch_forward=launch_forward)
    ((_, _, lse),) = kernel.forward(q, q, q, [Tile(0, 1, 0, 2, 0, 2, None, 0)], 1.0)
    assert lse.tolist() == [[[-torch.inf, 1.0]]]


@pytest.mark.parametrize(
    "function, operator, num_results",
    [(aten_forward, cuda_flash._ATEN_FORWARD, 5), (aten_backward, cuda_flash._ATEN_BACKWARD, 3)],
    ids=["forward", "backward"],
)
def test_stand_ins_have_the_schemas_of_pytorch(function, operator, num_results):
    names = [argument.name for argument in operator._schema.arguments]
    message = f"PyTorch {torch.__version__}: {operator._schema}"
    parameters = list(inspect.signature(function).parameters)
    # Until torch 2.10 there are no `block_table` and `num_splits`, which no call sets.
    assert names == [x for x in parameters if x not in ("block_table", "num_splits") or x in names], message
    assert len(operator._schema.returns) == num_results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_shapes_and_dtypes_are_right_for_the_operators_of_pytorch(heads, dtype, monkeypatch):
    # Two Python methods require CUDA even for fake tensors; the operators behind them do not.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    index = torch.ops.aten.index.Tensor
    monkeypatch.setattr(GatherIndex, "gather", lambda self, x: index(x.transpose(1, 2), [self.rows_T, self.tokens_T]))
    (num_heads, num_kv), (dim, v_dim) = HEADS[heads]
    flash_varlen._group_tiles.cache_clear()
    with FakeTensorMode():
        q, k, v, dout, out = (
            torch.empty(2, 40, number, width, dtype=dtype, device="cuda").transpose(1, 2)
            for number, width in ((num_heads, dim), (num_kv, dim), (num_kv, v_dim), *[(num_heads, v_dim)] * 2)
        )
        lse = torch.empty(2, num_heads, 40, device="cuda")
        for tiles in (
            [Tile(0, 2, 0, 40, 0, 40, None, 0)],
            [Tile(0, 2, 0, 5, 0, 5, None, 0), Tile(0, 1, 5, 9, 5, 9, None, 0)],
        ):
            for queries, tile_out, tile_lse in cuda_flash.KERNEL.forward(q, k, v, tiles, 0.3):
                assert tile_out.shape == queries.gather(out).shape and tile_out.dtype == dtype
                assert tile_lse.shape == queries.gather(lse).shape and tile_lse.dtype == torch.float32
            for queries, keys, *grads in cuda_flash.KERNEL.backward(dout, q, k, v, out, lse, tiles, 0.3):
                for tokens, grad, x in zip((queries, keys, keys), grads, (q, k, v), strict=True):
                    assert grad.shape == tokens.gather(x).shape
                    assert grad.dtype == dtype and grad.device.type == "cuda"
