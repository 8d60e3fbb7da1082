"""From tiles to launches of FlashAttention (Dao 2023, arXiv 2307.08691), for every package that has it.

The window is aligned at the bottom right: query i of Sq attends to key j of Sk iff `i + Sk - Sq - left <= j` and
`j <= i + Sk - Sq + right`. A band `lo <= j - i <= hi` is therefore `left = (Sk - Sq) - lo` and `right = hi - (Sk -
Sq)`, both >= 0 once the band is trimmed (read in Dao-AILab/flash-attention@v2.8.3:csrc/flash_attn/src/mask.h).
FlashAttention-2's host code clamps windows to Sk and loses part of the band where Sq > Sk + 1 (same tag,
csrc/flash_attn/flash_api.cpp, and its copy in PyTorch; their issue 895). For it, these tiles are split into rows that
attend to every key and rows that do not.

A long tile is one dense launch on views. Short tiles of a step that share a window are the documents of one packed
launch (varlen), in which every query and every key appears at most once, the longest documents first, because blocks
are scheduled in that order. A short tile that is alone with its window is a dense launch. Every layer of a model has
the same tiles, forward and backward, so the indices of packed launches stay on the device for the next ones.

Inputs: fp16 or bf16; head dims padded with zeros to multiples of 8, and for most kernels to one size, which changes
neither scores nor sums (the scale is passed); lse contiguous in fp32, because kernels read it through a raw pointer.
Outputs: lse in natural logarithms, +inf for rows without visible keys where ours is -inf.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, T tokens of a packed
launch, N documents of it, D and E head dims. Dense launches take BSHD and return lse BHS, packed ones THD and HT.
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

from ..geometry import CausalBlock, Tile, trim
from .indexing import GatherIndex, StridedWindows, TokenIndex
from .kernel import SupportCheck
from .merge import accumulate_dtype

DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
DEVICE_TYPE = "cuda"
MAX_HEAD_DIM = 256
MIN_DENSE_QUERIES = 1024  # a tile with so many queries fills a device


@dataclass(frozen=True, slots=True)
class VarlenMetadata:
    """The documents of a packed launch: cumulative lengths int32 `[N + 1]`, and the length of the longest in tokens.

    The names are those of FlashAttention's arguments.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True, slots=True)
class FlashLaunch:
    """One launch of a kernel; a window bound of None does not bind, and without `varlen` the launch is dense."""

    queries: TokenIndex
    keys: TokenIndex
    left: int | None
    right: int | None
    varlen: VarlenMetadata | None = None


LaunchForward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, FlashLaunch, float, float | None], tuple[torch.Tensor, torch.Tensor]
]
LaunchBackward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
PaddedHeadDims = Callable[[torch.Tensor, torch.Tensor], tuple[int, int]]


def why_unsupported(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why no FlashAttention supports a call, or None; `q` and `v` as for `Kernel`."""
    if q.device.type != DEVICE_TYPE:
        return f"the tensors are on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if (head_dim := max(q.shape[-1], v.shape[-1])) > MAX_HEAD_DIM:
        return f"head dim {head_dim} is above {MAX_HEAD_DIM}"
    if torch.version.hip:
        return "the device is driven by ROCm, whose kernels differ"
    capability = get_capability(q.device)
    if capability is None:
        return "PyTorch finds no CUDA device"
    return f"compute capability {format_version(capability)} is below 8.0" if capability < (8, 0) else None


def get_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device, or None if there is no GPU (tensors of a fake mode)."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def format_version(numbers: tuple[int, ...]) -> str:
    """Return "9.0" for (9, 0)."""
    return ".".join(map(str, numbers))


def round_up_8(head_dim: int) -> int:
    """Return the next multiple of 8: 16-byte loads need it in half precision."""
    return -(-head_dim // 8) * 8


def shared_head_dim(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """Return one head dim for queries and keys, and for values, from `q [..., D]` and `v [..., E]`."""
    head_dim = round_up_8(max(q.shape[-1], v.shape[-1]))
    return head_dim, head_dim


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """A kernel made of the functions of a package.

    Shapes and dtypes are those of `Kernel`.

    Args:
        NAME: the name of the kernel.
        why_unsupported: see `Kernel`.
        launch_forward: `(q, k, v, launch, scale, softcap) -> (out, lse)`, in the kernel's layout.
        launch_backward: `(dout, q, k, v, out, lse, launch, scale, softcap) -> (dq, dk, dv)`.
        padded_head_dims: `(q, v) -> (dim of q and k, dim of v and out)`, to which head dims are padded.
        split_tall_tiles: no tile has more queries than keys + 1.
    """

    NAME: str
    why_unsupported: SupportCheck
    launch_forward: LaunchForward
    launch_backward: LaunchBackward
    padded_head_dims: PaddedHeadDims = shared_head_dim
    split_tall_tiles: bool = True

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, torch.Tensor, torch.Tensor]]:
        """Yield `(queries, out, lse)` launch by launch."""
        value_dim = v_BKSE.shape[-1]
        padded_dim, padded_value_dim = self.padded_head_dims(q_BHCD, v_BKSE)
        q, k = pad_head_dim(q_BHCD, padded_dim), pad_head_dim(k_BKSD, padded_dim)
        v = pad_head_dim(v_BKSE, padded_value_dim)
        for launch in plan_launches(tiles, q.device, self.split_tall_tiles):
            inputs = (
                to_kernel_layout(q, launch.queries),
                to_kernel_layout(k, launch.keys),
                to_kernel_layout(v, launch.keys),
            )
            out, lse = self.launch_forward(*inputs, launch, scale, softcap)
            del inputs
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
            lse = lse.transpose(0, 1) if isinstance(launch.queries, GatherIndex) else lse
            yield launch.queries, from_kernel_layout(out, launch.queries, value_dim), lse
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
        """Yield `(queries, keys, dq, dk, dv)` launch by launch, from the global `out` and `lse`."""
        key_dim, value_dim = k_BKSD.shape[-1], v_BKSE.shape[-1]
        padded_dim, padded_value_dim = self.padded_head_dims(q_BHCD, v_BKSE)
        q, k = pad_head_dim(q_BHCD, padded_dim), pad_head_dim(k_BKSD, padded_dim)
        v = pad_head_dim(v_BKSE, padded_value_dim)
        dout, out = (pad_head_dim(x.to(q.dtype), padded_value_dim) for x in (dout_BHCE, out_BHCE))
        for launch in plan_launches(tiles, q.device, self.split_tall_tiles):
            inputs = (
                to_kernel_layout(dout, launch.queries),
                to_kernel_layout(q, launch.queries),
                to_kernel_layout(k, launch.keys),
                to_kernel_layout(v, launch.keys),
                to_kernel_layout(out, launch.queries),
                gather_lse(lse_BHC, launch.queries, accumulate_dtype(q.dtype)),
            )
            dq, dk, dv = self.launch_backward(*inputs, launch, scale, softcap)
            del inputs
            yield (
                launch.queries,
                launch.keys,
                from_kernel_layout(dq, launch.queries, key_dim),
                from_kernel_layout(dk, launch.keys, key_dim),
                from_kernel_layout(dv, launch.keys, value_dim),
            )
            del dq, dk, dv


def pad_head_dim(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return `x [..., D]` with D padded with zeros to `head_dim`, a multiple of 8, and rows aligned to 16 bytes."""
    if x.shape[-1] < head_dim:
        x = pad(x, (0, head_dim - x.shape[-1]))
    is_aligned = x.stride(-1) == 1 and not any(n % 8 for n in (x.storage_offset(), *x.stride()[:-1]))
    return x if is_aligned else x.contiguous()


def to_kernel_layout(x_BHSD: torch.Tensor, tokens: TokenIndex) -> torch.Tensor:
    """Return these tokens of `x [B, H, S, D]` in the layout of a launch: a view BSHD, or a copy THD."""
    return tokens.gather(x_BHSD) if isinstance(tokens, GatherIndex) else tokens.gather(x_BHSD).transpose(1, 2)


def from_kernel_layout(x: torch.Tensor, tokens: TokenIndex, head_dim: int) -> torch.Tensor:
    """Return a result of a launch, BSHD or THD, in the shape of its index and without padding of the head dim."""
    return (x if isinstance(tokens, GatherIndex) else x.transpose(1, 2)).narrow(-1, 0, head_dim)


def gather_lse(lse_BHC: torch.Tensor, queries: TokenIndex, dtype: torch.dtype) -> torch.Tensor:
    """Return the global lse as backward reads it: contiguous BHS or HT, in fp32."""
    lse = queries.gather(lse_BHC).to(dtype)
    return (lse.transpose(0, 1) if isinstance(queries, GatherIndex) else lse).contiguous()


def plan_launches(tiles: Iterable[Tile], device: torch.device, split_tall_tiles: bool = True) -> Iterator[FlashLaunch]:
    """Yield launches that together compute every visible pair of the tiles exactly once.

    Args:
        tiles: the tiles of one step.
        device: where the indices of packed launches are stored.
        split_tall_tiles: see `FlashKernel`.
    """
    for group in _group_tiles(tuple(tiles), split_tall_tiles):
        if len(group) == 1:
            tile = group[0]
            block = CausalBlock(0, tile.num_q, 0, tile.num_k, "full")
            queries, keys = StridedWindows.queries(tile, block), StridedWindows.keys(tile, block)
            yield FlashLaunch(queries, keys, *compute_window(tile))
        else:
            yield _launch_cache.get(group, device)


def compute_window(tile: Tile) -> tuple[int | None, int | None]:
    """Return FlashAttention's `(left, right)` of a trimmed tile, in tokens."""
    shift = tile.num_k - tile.num_q
    return None if tile.lo is None else shift - tile.lo, None if tile.hi is None else tile.hi - shift


def trim_tile(tile: Tile) -> Iterator[Tile]:
    """Yield the tile without queries and keys that have no visible pair, or nothing if there is no pair."""
    trimmed = trim(tile.num_q, tile.num_k, tile.lo, tile.hi)
    if trimmed is not None:
        q, num_q, k, num_k, lo, hi = trimmed
        yield Tile(tile.row, tile.num_rows, tile.q + q, num_q, tile.k + k, num_k, lo, hi)


def split_tall_tile(tile: Tile) -> Iterator[Tile]:
    """Yield trimmed tiles without bounds, or with at most one query more than keys, which all host code gets right."""
    for trimmed in trim_tile(tile):
        yield from _split_queries(trimmed)


def _split_queries(tile: Tile) -> Iterator[Tile]:
    num_q, num_k, lo, hi = tile.num_q, tile.num_k, tile.lo, tile.hi
    if (lo is None and hi is None) or num_q <= num_k + 1:
        yield tile
        return
    # Queries from `begin` to `end` attend to every key. If there are none, two halves have enough keys each.
    begin = 0 if hi is None else num_k - 1 - hi
    end = num_q if lo is None else 1 - lo
    bounds = (0, begin, end, num_q) if begin < end else (0, num_k, num_q)
    for first, last in itertools.pairwise(bounds):
        part_lo, part_hi = (None if bound is None else bound + first for bound in (lo, hi))
        yield from split_tall_tile(replace(tile, q=tile.q + first, num_q=last - first, lo=part_lo, hi=part_hi))


@dataclass
class _TilePack:
    """Tiles of one packed launch, and their tokens: sorted spans `(start, end)` per side and batch row."""

    tiles: list[Tile] = field(default_factory=list)
    _spans: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=dict)

    def try_add(self, tile: Tile) -> bool:
        """Add the tile and return True, unless the pack has one of its queries or keys."""
        sides = ("q", (tile.q, tile.q + tile.num_q)), ("k", (tile.k, tile.k + tile.num_k))
        insertions = [
            (self._spans.setdefault((side, row), []), span)
            for side, span in sides
            for row in range(tile.row, tile.row + tile.num_rows)
        ]
        for spans, (start, end) in insertions:
            index = bisect_left(spans, (start, start))
            if (index < len(spans) and spans[index][0] < end) or (index and spans[index - 1][1] > start):
                return False
        for spans, span in insertions:
            insort(spans, span)
        self.tiles.append(tile)
        return True


@functools.lru_cache(maxsize=256)
def _group_tiles(tiles: tuple[Tile, ...], split_tall_tiles: bool) -> tuple[tuple[Tile, ...], ...]:
    """Return the tiles of each launch."""
    groups: list[tuple[Tile, ...]] = []
    packs_by_window: dict[tuple[int | None, int | None], list[_TilePack]] = {}
    prepare = split_tall_tile if split_tall_tiles else trim_tile
    for tile in itertools.chain.from_iterable(prepare(tile) for tile in tiles):
        if tile.num_q >= MIN_DENSE_QUERIES:
            groups.append((tile,))
            continue
        packs = packs_by_window.setdefault(compute_window(tile), [])
        if not any(pack.try_add(tile) for pack in packs):
            packs.append(_TilePack())
            packs[-1].try_add(tile)
    for pack in itertools.chain.from_iterable(packs_by_window.values()):
        groups.append(tuple(sorted(pack.tiles, key=_num_pairs, reverse=True)))
    return tuple(groups)


def _num_pairs(tile: Tile) -> int:
    """Return an upper bound of the visible pairs in one batch row."""
    return tile.num_q * tile.num_k


class _LaunchCache:
    """The packed launches used last, with their indices on the device: at most `max_tokens`, at least one launch.

    Each stream has its own entries: another stream could read indices before they are written. Under a tensor mode
    (fake tensors of a compiler) launches are neither stored nor taken from here.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._launches: OrderedDict[tuple[tuple[Tile, ...], torch.device, int], FlashLaunch] = OrderedDict()
        self._lock = threading.Lock()  # autograd runs backward in a thread of its own

    def get(self, tiles: tuple[Tile, ...], device: torch.device) -> FlashLaunch:
        """Return the packed launch of tiles that share a window, with its indices on `device`."""
        if type(torch.empty(0)) is not torch.Tensor:
            return _make_packed_launch(tiles, device)
        key = tiles, device, torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
        with self._lock:
            launch = self._launches.pop(key, None)
            if launch is None:
                # Training must be able to use a launch that an evaluation in inference mode needs first.
                with torch.inference_mode(False):
                    launch = _make_packed_launch(tiles, device)
                self._num_tokens += _count_tokens(launch)
            self._launches[key] = launch
            while self._num_tokens > self._max_tokens and len(self._launches) > 1:
                self._num_tokens -= _count_tokens(self._launches.popitem(last=False)[1])
        return launch


_launch_cache = _LaunchCache(max_tokens=1 << 23)  # 128 MiB


def _count_tokens(launch: FlashLaunch) -> int:
    assert isinstance(launch.queries, GatherIndex) and isinstance(launch.keys, GatherIndex)
    return len(launch.queries.rows_T) + len(launch.keys.rows_T)


def _make_packed_launch(tiles: tuple[Tile, ...], device: torch.device) -> FlashLaunch:
    documents = [replace(tile, row=tile.row + n, num_rows=1) for tile in tiles for n in range(tile.num_rows)]
    queries, cu_seqlens_q = _index_tokens([(tile.row, tile.q, tile.num_q) for tile in documents], device)
    keys, cu_seqlens_k = _index_tokens([(tile.row, tile.k, tile.num_k) for tile in documents], device)
    max_seqlen_q, max_seqlen_k = max(tile.num_q for tile in documents), max(tile.num_k for tile in documents)
    varlen = VarlenMetadata(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return FlashLaunch(queries, keys, *compute_window(tiles[0]), varlen)


def _index_tokens(spans: list[tuple[int, int, int]], device: torch.device) -> tuple[GatherIndex, torch.Tensor]:
    """Return the tokens of concatenated spans `(row, start, length)`, and the cumulative lengths in int32."""
    offsets = list(itertools.accumulate((length for _, _, length in spans), initial=0))
    columns = [(row, start - offset, length) for (row, start, length), offset in zip(spans, offsets, strict=False)]
    rows_N, shifts_N, lengths_N = torch.tensor(columns, device=device).unbind(1)
    num_tokens = offsets[-1]
    repeat = functools.partial(torch.repeat_interleave, repeats=lengths_N, output_size=num_tokens)
    tokens_T = torch.arange(num_tokens, device=device) + repeat(shifts_N)
    return GatherIndex(repeat(rows_N), tokens_T), torch.tensor(offsets, dtype=torch.int32, device=device)
