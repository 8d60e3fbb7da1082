"""How tiles become calls: packed documents, their indices on the device, PyTorch's operator on fake tensors."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ring_hf.geometry import Tile
from ring_hf.kernels import KERNELS, GatherIndex, cuda_flash, flash_varlen
from ring_hf.parallel import local_attention
from tests.flash_stand_ins import CALLS, aten_backward, aten_forward, stand_in
from tests.kernels.test_flash_contract import HEADS

CPU = torch.device("cpu")
SHORT = (Tile(0, 1, 0, 4, 0, 4, None, 0), Tile(0, 1, 4, 9, 4, 9, None, 0), Tile(0, 2, 20, 2, 20, 2, None, 0))


@pytest.fixture
def made(monkeypatch):
    """What index tensors are made for, with nothing kept from before."""
    found, original = [], flash_varlen._tokens
    monkeypatch.setattr(flash_varlen, "_packed_calls", flash_varlen._PackedCalls(most=100))
    monkeypatch.setattr(flash_varlen, "_tokens", lambda *x: found.append(x) or original(*x))
    return found


def test_many_documents_are_one_call_and_large_tiles_are_their_own():
    bounds = (0, 3, 8, 15, 25, 64)
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with stand_in("2.8.3", large=30) as kernel:
        CALLS.clear()
        local_attention(q, k, v, documents=(bounds,), kernel=kernel)[0].sum().backward()
        assert (CALLS["dense"], CALLS["packed"]) == (1, 1)  # the stand-in counts forward


def test_a_short_tile_without_company_is_a_dense_call(made):
    (call,) = flash_varlen.calls([SHORT[0]], CPU)
    assert call.documents is None and not made


def test_a_query_or_key_appears_once_in_a_call():
    tiles = [
        Tile(0, 2, 0, 4, 0, 4, None, None),
        Tile(0, 2, 4, 4, 4, 4, None, None),
        Tile(0, 1, 2, 4, 8, 4, None, None),
    ]
    found = list(flash_varlen.calls(tiles, torch.device("cpu")))
    assert [len(call.documents.cu_q) - 1 if call.documents else None for call in found] == [4, None]
    tokens = found[0].queries
    assert isinstance(tokens, GatherIndex)
    pairs = list(zip(tokens.rows_T.tolist(), tokens.tokens_T.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 16


def test_the_longest_documents_of_a_call_come_first(made):
    (call,) = flash_varlen.calls(SHORT, CPU)
    assert call.documents.cu_q.tolist() == [0, 9, 13, 15, 17]


def test_the_second_call_makes_no_indices(made):
    (first,), (second,) = flash_varlen.calls(SHORT, CPU), flash_varlen.calls(list(SHORT), CPU)
    assert first is second and len(made) == 2  # queries and keys
    with stand_in("3-2025-09") as kernel:
        q = torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True)
        number = []
        for _ in range(3):
            local_attention(q, q, q, documents=((0, 3, 8, 15, 40),), kernel=kernel)[0].sum().backward()
            number.append(len(made))
    assert number == [4, 4, 4]  # backward and the next layers use those of the first forward


def test_indices_are_kept_within_a_bound_the_oldest_go(made):
    others = [[replace(tile, q=tile.q + n, k=tile.k + n) for tile in SHORT] for n in range(10)]
    for tiles in others:
        list(flash_varlen.calls(tiles, CPU))
    kept = flash_varlen._packed_calls
    assert len(made) == 20 and len(kept._kept) == 2 and kept._tokens == 2 * 34
    list(flash_varlen.calls(others[-1], CPU))
    assert len(made) == 20
    list(flash_varlen.calls(others[0], CPU))
    assert len(made) == 22


def test_fake_tensors_are_neither_kept_nor_given_real_ones(made):
    (real,) = flash_varlen.calls(SHORT, CPU)
    with FakeTensorMode():
        (fake,) = flash_varlen.calls(SHORT, CPU)
        assert isinstance(fake.documents.cu_q, FakeTensor) and isinstance(fake.queries.rows_T, FakeTensor)
    (again,) = flash_varlen.calls(SHORT, CPU)
    assert again is real and type(again.documents.cu_q) is torch.Tensor


def test_indices_made_in_inference_mode_serve_training(made):
    with torch.inference_mode():
        (call,) = flash_varlen.calls(SHORT, CPU)
    assert not call.queries.rows_T.is_inference() and not call.documents.cu_q.is_inference()


def test_compiling_keeps_no_fake_tensor(made):
    q = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    with stand_in("2.8.3") as kernel:
        torch.compile(
            lambda q: local_attention(q, q, q, documents=((0, 3, 8, 40),), kernel=kernel)[0] * 2, backend="aot_eager"
        )(q)
    kept = flash_varlen._packed_calls._kept.values()
    assert kept and all(type(call.queries.rows_T) is torch.Tensor for call in kept)


def test_rows_that_saw_nothing_come_back_with_lse_minus_infinity():
    q = torch.zeros(1, 1, 2, 8)

    def attend(q, k, v, call, scale, softcap):
        return torch.zeros_like(q), torch.tensor([[[torch.inf, 1.0]]])

    kernel = replace(KERNELS["cuda_flash"], attend=attend)
    ((_, _, lse),) = kernel.forward(q, q, q, [Tile(0, 1, 0, 2, 0, 2, None, 0)], 1.0)
    assert lse.tolist() == [[[-torch.inf, 1.0]]]


@pytest.mark.parametrize(
    "stand, real",
    [(aten_forward, cuda_flash._forward), (aten_backward, cuda_flash._backward)],
    ids=["forward", "backward"],
)
def test_pytorchs_schemas_are_those_that_were_read(stand, real):
    schema = [argument.name for argument in real._schema.arguments]
    assert schema == list(inspect.signature(stand).parameters), f"PyTorch {torch.__version__}: {real._schema}"
    assert len(real._schema.returns) == (5 if stand is aten_forward else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_shapes_and_dtypes_are_right_for_pytorchs_own_operators(heads, dtype, monkeypatch):
    # Two Python methods ask for CUDA even of fake tensors; the operators behind them do not.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    index = torch.ops.aten.index.Tensor
    monkeypatch.setattr(GatherIndex, "of", lambda self, x: index(x.transpose(1, 2), [self.rows_T, self.tokens_T]))
    (num_heads, num_kv), (dim, v_dim) = HEADS[heads]
    flash_varlen._grouped.cache_clear()
    with FakeTensorMode():
        q, k, v, dout, out = (
            torch.empty(2, 40, number, width, dtype=dtype, device="cuda").transpose(1, 2)
            for number, width in ((num_heads, dim), (num_kv, dim), *[(num_kv, v_dim)], *[(num_heads, v_dim)] * 2)
        )
        lse = torch.empty(2, num_heads, 40, device="cuda")
        for tiles in (
            [Tile(0, 2, 0, 40, 0, 40, None, 0)],
            [Tile(0, 2, 0, 5, 0, 5, None, 0), Tile(0, 1, 5, 9, 5, 9, None, 0)],
        ):
            for queries, one_out, one_lse in cuda_flash.KERNEL.forward(q, k, v, tiles, 0.3):
                assert one_out.shape == queries.of(out).shape and one_out.dtype == dtype
                assert one_lse.shape == queries.of(lse).shape and one_lse.dtype == torch.float32
            for queries, keys, *grads in cuda_flash.KERNEL.backward(dout, q, k, v, out, lse, tiles, 0.3):
                for place, grad, x in zip((queries, keys, keys), grads, (q, k, v), strict=True):
                    assert grad.shape == place.of(x).shape and grad.dtype == dtype and grad.device.type == "cuda"
