"""From tiles to calls of FlashAttention, however a package spells them (Dao 2023, arXiv 2307.08691).

The window is aligned at the bottom right: query i of Sq sees key j of Sk iff `i + Sk - Sq - left <= j <= i + Sk - Sq +
right`. A band `lo <= j - i <= hi` is therefore `left = (Sk - Sq) - lo` and `right = hi - (Sk - Sq)`, and both are >= 0
once the band is trimmed (read in Dao-AILab/flash-attention@v2.8.3:csrc/flash_attn/src/mask.h). FlashAttention-2's
host code clamps windows to Sk and forgets part of the band where Sq > Sk + 1 (same tag, csrc/flash_attn/flash_api.cpp,
and its copy in PyTorch; their issue 895), so for it such tiles are cut into rows that see every key and rows that do
not.

A large tile is one dense call on views. Short tiles of a step that share a window are the documents of one packed call
(varlen), in which every query and every key appears at most once, the longest first, as blocks are started in that
order. A short tile without company is a dense call. Every layer of a model has the same tiles, forward and backward,
so the indices of packed calls stay on the device for the calls to come.

What goes in: fp16 or bf16; head dims padded with zeros to multiples of 8, and for most kernels to one size, which
changes neither scores nor sums (the scale is passed); lse contiguous in fp32, as kernels read it through a raw
pointer. What comes out: lse in natural logarithms, +inf for rows that saw nothing where ours is -inf.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, T tokens of a packed
call, N documents of it, D and E head dims. Dense calls take BSHD and give lse BHS, packed ones take THD and give HT.
"""

import functools
import itertools
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from ..geometry import Piece, Tile, trim
from .indexing import GatherIndex, StridedWindows, TokenIndex
from .merge import accumulate_dtype

DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
DEVICE = "cuda"
WIDEST = 256
LARGE = 1024  # queries: from here on a tile fills a device by itself


@dataclass(frozen=True, slots=True)
class Documents:
    """Cumulative lengths of a packed call's queries and keys, int32 `[N + 1]`, and the longest of each."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, slots=True)
class FlashLaunch:
    """One call of a kernel; `left` and `right` None: no bound on that side."""

    queries: TokenIndex
    keys: TokenIndex
    left: int | None
    right: int | None
    documents: Documents | None = None


Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, FlashLaunch, float, float | None], tuple[torch.Tensor, torch.Tensor]
]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Widths = Callable[[torch.Tensor, torch.Tensor], tuple[int, int]]


def why_unsupported(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why no FlashAttention can serve such tensors, or None."""
    if q.device.type != DEVICE:
        return f"the tensors are on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if (width := max(q.shape[-1], v.shape[-1])) > WIDEST:
        return f"head dim {width} is above {WIDEST}"
    if torch.version.hip:
        return "the device is driven by ROCm, whose kernels differ"
    if (found := capability(q.device)) is None:
        return "PyTorch finds no CUDA device"
    return f"compute capability {dotted(found)} is below 8.0" if found < (8, 0) else None


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a device, None without one (tensors of a fake mode)."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def eights(width: int) -> int:
    """The next multiple of 8: what 16 byte loads of half precision need."""
    return -(-width // 8) * 8


def one_width(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """One head dim for queries, keys and values."""
    return (eights(max(q.shape[-1], v.shape[-1])),) * 2


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """A kernel made of the calls of a package.

    `attend(q, k, v, call, scale, softcap)` returns `(out, lse)`, `differentiate(dout, q, k, v, out, lse, call, scale,
    softcap)` returns `(dq, dk, dv)`. `widths(q, v)` are the head dims that q, k and v, out are padded to. With
    `cuts_rows` no tile has more queries than keys and one.
    """

    NAME: str
    why_unsupported: Callable[[torch.Tensor, torch.Tensor, float | None], str | None]
    attend: Forward
    differentiate: Backward
    widths: Widths = one_width
    cuts_rows: bool = True

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, out, lse)` call by call."""
        value_dim = v_BKSE.shape[-1]
        width, value_width = self.widths(q_BHCD, v_BKSE)
        q, k, v = padded(q_BHCD, width), padded(k_BKSD, width), padded(v_BKSE, value_width)
        for call in calls(tiles, q.device, self.cuts_rows):
            at = taken(q, call.queries), taken(k, call.keys), taken(v, call.keys)
            out, lse = self.attend(*at, call, scale, softcap)
            del at
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
            lse = lse.transpose(0, 1) if isinstance(call.queries, GatherIndex) else lse
            yield call.queries, given_back(out, call.queries, value_dim), lse
            del out, lse

    def backward(
        self,
        dout_BHCE: torch.Tensor,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        out_BHCE: torch.Tensor,
        lse_BHC: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, TokenIndex, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, keys, dq, dk, dv)` call by call, from the global `out` and `lse`."""
        key_dim, value_dim = k_BKSD.shape[-1], v_BKSE.shape[-1]
        width, value_width = self.widths(q_BHCD, v_BKSE)
        q, k, v = padded(q_BHCD, width), padded(k_BKSD, width), padded(v_BKSE, value_width)
        dout, out = (padded(x.to(q.dtype), value_width) for x in (dout_BHCE, out_BHCE))
        for call in calls(tiles, q.device, self.cuts_rows):
            at_q, at_k = (functools.partial(taken, place=place) for place in (call.queries, call.keys))
            lse = lse_for(lse_BHC, call.queries, accumulate_dtype(q.dtype))
            tensors = at_q(dout), at_q(q), at_k(k), at_k(v), at_q(out), lse
            dq, dk, dv = self.differentiate(*tensors, call, scale, softcap)
            del tensors, lse
            yield (
                call.queries,
                call.keys,
                given_back(dq, call.queries, key_dim),
                given_back(dk, call.keys, key_dim),
                given_back(dv, call.keys, value_dim),
            )
            del dq, dk, dv


def padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros up to this head dim, a multiple of 8, and with rows where 16 byte loads may begin."""
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))
    loadable = x.stride(-1) == 1 and not any(n % 8 for n in (x.storage_offset(), *x.stride()[:-1]))
    return x if loadable else x.contiguous()


def taken(x_BHSD: torch.Tensor, place: TokenIndex) -> torch.Tensor:
    """The tokens at a place as kernels take them: BSHD or THD."""
    return place.of(x_BHSD) if isinstance(place, GatherIndex) else place.of(x_BHSD).transpose(1, 2)


def given_back(x: torch.Tensor, place: TokenIndex, head_dim: int) -> torch.Tensor:
    """The inverse of `taken`, without the padding."""
    return (x if isinstance(place, GatherIndex) else x.transpose(1, 2)).narrow(-1, 0, head_dim)


def lse_for(lse_BHC: torch.Tensor, place: TokenIndex, dtype: torch.dtype) -> torch.Tensor:
    """Global lse as backward reads it: contiguous BHS or HT, in fp32."""
    lse = place.of(lse_BHC).to(dtype)
    return (lse.transpose(0, 1) if isinstance(place, GatherIndex) else lse).contiguous()


def calls(tiles: Iterable[Tile], device: torch.device, cuts_rows: bool = True) -> Iterator[FlashLaunch]:
    """The calls that together hold every visible pair of the tiles exactly once."""
    for part in _grouped(tuple(tiles), cuts_rows):
        if len(part) == 1:
            (tile,) = part
            whole = Piece(0, tile.num_q, 0, tile.num_k, "full")
            yield FlashLaunch(StridedWindows.queries(tile, whole), StridedWindows.keys(tile, whole), *window(tile))
        else:
            yield _packed_calls.get(part, device)


def window(tile: Tile) -> tuple[int | None, int | None]:
    """`(left, right)` of a trimmed tile."""
    apart = tile.num_k - tile.num_q
    return None if tile.lo is None else apart - tile.lo, None if tile.hi is None else tile.hi - apart


def trimmed(tile: Tile) -> Iterator[Tile]:
    """The tile without queries and keys that see nothing, if anything is left."""
    found = trim(tile.num_q, tile.num_k, tile.lo, tile.hi)
    if found is not None:
        q, num_q, k, num_k, lo, hi = found
        yield Tile(tile.row, tile.num_rows, tile.q + q, num_q, tile.k + k, num_k, lo, hi)


def cut_rows(whole: Tile) -> Iterator[Tile]:
    """Trimmed tiles that no host code gets wrong: without bounds, or with at most one query more than keys."""
    for tile in trimmed(whole):
        yield from _cut(tile)


def _cut(tile: Tile) -> Iterator[Tile]:
    num_q, num_k, lo, hi = tile.num_q, tile.num_k, tile.lo, tile.hi
    if (lo is None and hi is None) or num_q <= num_k + 1:
        yield tile
        return
    # Rows from `begin` to `end` see every key. If there are none, two halves have keys enough.
    begin, end = 0 if hi is None else num_k - 1 - hi, num_q if lo is None else 1 - lo
    for first, last in itertools.pairwise((0, begin, end, num_q) if begin < end else (0, num_k, num_q)):
        low, high = (None if bound is None else bound + first for bound in (lo, hi))
        yield from cut_rows(replace(tile, q=tile.q + first, num_q=last - first, lo=low, hi=high))


@dataclass
class _Pack:
    """Tiles of one packed call, and which tokens they took: sorted `(start, end)` per side and batch row."""

    tiles: list[Tile] = field(default_factory=list)
    _spans: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=dict)

    def take(self, tile: Tile) -> bool:
        """Adds the tile unless one of its queries or keys is taken."""
        wanted = [
            (self._spans.setdefault((side, row), []), span)
            for side, span in (("q", (tile.q, tile.q + tile.num_q)), ("k", (tile.k, tile.k + tile.num_k)))
            for row in range(tile.row, tile.row + tile.num_rows)
        ]
        for spans, (start, end) in wanted:
            at = bisect_left(spans, (start, start))
            if (at < len(spans) and spans[at][0] < end) or (at and spans[at - 1][1] > start):
                return False
        for spans, span in wanted:
            insort(spans, span)
        self.tiles.append(tile)
        return True


@functools.lru_cache(maxsize=256)
def _grouped(tiles: tuple[Tile, ...], cuts_rows: bool) -> tuple[tuple[Tile, ...], ...]:
    """The tiles of each call."""
    large: list[tuple[Tile, ...]] = []
    packs: dict[tuple[int | None, int | None], list[_Pack]] = {}
    for tile in itertools.chain.from_iterable((cut_rows if cuts_rows else trimmed)(tile) for tile in tiles):
        if tile.num_q >= LARGE:
            large.append((tile,))
            continue
        fitting = packs.setdefault(window(tile), [])
        if not any(pack.take(tile) for pack in fitting):
            fitting.append(_Pack())
            fitting[-1].take(tile)
    short = (sorted(pack.tiles, key=_work, reverse=True) for found in packs.values() for pack in found)
    return *large, *map(tuple, short)


def _work(tile: Tile) -> int:
    """Pairs of one of its rows, an upper bound."""
    return tile.num_q * tile.num_k


class _PackedCalls:
    """The packed calls made last, with their indices on the device: at most `most` tokens, at least one call.

    A stream has its own: another one could read what is not written yet. What is made under a tensor mode (fake
    tensors of a compiler) is not kept, nor is what was kept given to it.
    """

    def __init__(self, most: int) -> None:
        self._most, self._tokens = most, 0
        self._kept: OrderedDict[tuple[tuple[Tile, ...], torch.device, int], FlashLaunch] = OrderedDict()
        self._lock = threading.Lock()  # autograd runs backward in a thread of its own

    def get(self, tiles: tuple[Tile, ...], device: torch.device) -> FlashLaunch:
        """The one call of these tiles, which share a window."""
        if type(torch.empty(0)) is not torch.Tensor:
            return _packed(tiles, device)
        key = tiles, device, torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
        with self._lock:
            call = self._kept.pop(key, None)
            if call is None:
                # Kept for training too if the first to need it is an evaluation in inference mode.
                with torch.inference_mode(False):
                    call = _packed(tiles, device)
                self._tokens += _num_tokens(call)
            self._kept[key] = call
            while self._tokens > self._most and len(self._kept) > 1:
                self._tokens -= _num_tokens(self._kept.popitem(last=False)[1])
        return call


_packed_calls = _PackedCalls(most=1 << 23)  # 128 MiB


def _num_tokens(call: FlashLaunch) -> int:
    assert isinstance(call.queries, GatherIndex) and isinstance(call.keys, GatherIndex)
    return len(call.queries.rows_T) + len(call.keys.rows_T)


def _packed(tiles: tuple[Tile, ...], device: torch.device) -> FlashLaunch:
    rows = [replace(tile, row=tile.row + n, num_rows=1) for tile in tiles for n in range(tile.num_rows)]
    queries_T, cu_q = _tokens([(tile.row, tile.q, tile.num_q) for tile in rows], device)
    keys_T, cu_k = _tokens([(tile.row, tile.k, tile.num_k) for tile in rows], device)
    longest = max(tile.num_q for tile in rows), max(tile.num_k for tile in rows)
    return FlashLaunch(queries_T, keys_T, *window(tiles[0]), Documents(cu_q, cu_k, *longest))


def _tokens(spans: list[tuple[int, int, int]], device: torch.device) -> tuple[GatherIndex, torch.Tensor]:
    """The tokens of `(row, start, length)` one after another, and the cumulative lengths in int32."""
    lengths = [length for _, _, length in spans]
    ends = list(itertools.accumulate(lengths, initial=0))
    described = [(row, start - end, length) for (row, start, length), end in zip(spans, ends, strict=False)]
    rows_N, shifts_N, lengths_N = torch.tensor(described, device=device).unbind(1)
    repeat = functools.partial(torch.repeat_interleave, repeats=lengths_N, output_size=ends[-1])
    tokens_T = torch.arange(ends[-1], device=device) + repeat(shifts_N)
    return GatherIndex(repeat(rows_N), tokens_T), torch.tensor(ends, dtype=torch.int32, device=device)
