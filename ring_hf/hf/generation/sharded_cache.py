"""A KV cache of which every rank keeps a part.

    model.generate(input_ids, past_key_values=ContextParallelCache(model))

Every rank passes the whole prompt and returns the same tokens. Long inputs are dealt to the ranks in the zigzag layout
and computed by ring attention, whatever layout the model trains with; each rank keeps the keys and values of its own
tokens. Few new tokens are computed by all ranks, and one of them keeps their keys: the one with the fewest tokens, for
a run of `RUN_LENGTH` tokens. Every rank knows the number of tokens of every other, so this takes no message.

Shapes: B batch, K key/value heads, N new tokens, L tokens of this rank, D and E head dims.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from ring_hf.geometry import Segment, ShardedSequence, padded_length

from .. import context as process
from ..cache_step import CacheStep
from .common_stop import share_stopping
from .generation_hooks import WITHOUT_CACHE, check_model, install_hooks

RUN_LENGTH = 32  # consecutive tokens whose keys one rank keeps while tokens are decoded
_GROWTH = 256  # tokens by which buffers grow, so that a decoded token copies no cache


class ShardedLayer(CacheLayerMixin):
    """Keys `[B, K, L, D]` and values `[B, K, L, E]` that this rank keeps of one attention layer, in global order.

    Args:
        window: with a sliding window, the number of tokens that a query sees: older keys are dropped.

    Attributes:
        segments: the global positions of the keys.
        earlier_segments: the same without the tokens of the present step.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.step: CacheStep | None = None
        self.segments: tuple[Segment, ...] = ()
        self.earlier_segments: tuple[Segment, ...] = ()
        self._num_seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer, self._value_buffer = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self._key_buffer, self._value_buffer
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep this rank's part of the new keys and values.

        Args:
            key_states, value_states: `[B, K, N, D]` and `[B, K, N, E]` of the new tokens that this rank computes.

        Raises:
            ValueError: if no pass has been described to this layer.

        Returns:
            All that this rank keeps; if the tokens of the step are sharded, what it kept before and the new ones. A
            layer may compute its keys and values from what it caches (multi-head latent attention), so it must get
            the earlier ones too, and at least one token: the attention function knows which of them count.
        """
        step = self.step
        if step is None:
            raise ValueError(
                "A ContextParallelCache reached an attention layer without a pass of the model it was made for, so "
                "this rank would attend to its own keys only. Call that model, not its decoder or a copy."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.window is not None:
            self._drop_before(step.start - self.window + 1)
        self.earlier_segments = self.segments
        earlier = self.keys, self.values
        self._num_seen = end = step.start + step.num_tokens
        if step.sequence is None:
            if step.owner == step.rank:
                self._append(key_states, value_states, step.positions(step.rank))
            return (self.keys, self.values) if self.segments else (key_states, value_states)
        first = 0 if self.window is None else end - self.window + 1  # the oldest that the next token sees
        offset = 0
        for segment in step.positions(step.rank):
            start, stop = max(segment.start, first), min(segment.start + segment.length, end)
            if stop > start:
                tokens = slice(offset + start - segment.start, offset + stop - segment.start)
                self._append(key_states[:, :, tokens], value_states[:, :, tokens], (Segment(start, stop - start, 1),))
            offset += segment.length
        if not self.earlier_segments:
            return key_states, value_states
        keys, values = (torch.cat(pair, dim=2) for pair in zip(earlier, (key_states, value_states), strict=True))
        return keys, values

    def _append(self, keys: torch.Tensor, values: torch.Tensor, segments: tuple[Segment, ...]) -> None:
        used, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if end > self._key_buffer.shape[2]:
            capacity = end if used == 0 else end + _GROWTH
            self._key_buffer, self._value_buffer = (
                torch.cat([kept, kept.new_empty(*kept.shape[:2], capacity - used, kept.shape[3])], dim=2)
                for kept in (self.keys, self.values)
            )
        self._key_buffer[:, :, used:end] = keys
        self._value_buffer[:, :, used:end] = values
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        for segment in segments:
            last = self.segments[-1] if self.segments else None
            if last is not None and last.start + last.length == segment.start:
                self.segments = (*self.segments[:-1], Segment(last.start, last.length + segment.length, 1))
            else:
                self.segments = (*self.segments, segment)

    def _drop_before(self, first: int) -> None:
        """Drop the keys of positions before `first`."""
        kept = []
        for segment in self.segments:
            start, stop = max(segment.start, first), segment.start + segment.length
            if stop > start:
                kept.append(Segment(start, stop - start, 1))
        num_dropped = sum(segment.length for segment in self.segments) - sum(segment.length for segment in kept)
        if num_dropped:
            self.segments = tuple(kept)
            # A copy, so that the memory of dropped keys is freed.
            self._key_buffer, self._value_buffer = (x[:, :, num_dropped:].clone() for x in (self.keys, self.values))
            self.keys, self.values = self._key_buffer, self._value_buffer

    def get_seq_length(self) -> int:
        """Return the number of tokens of the whole sequence, on all ranks."""
        return self._num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._num_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        """Forget all tokens."""
        self.segments = self.earlier_segments = ()
        self._num_seen = 0
        self.is_initialized = False
        self.keys = self.values = None  # type: ignore[assignment]


class ContextParallelCache(Cache):
    """A KV cache that the ranks of `ContextParallelConfig` share: each keeps 1 / context_parallel_size of it.

    Pass one to `generate` as `past_key_values` on every rank, with the same whole prompt and arguments; all ranks
    return the same tokens. Sampling follows the random state of the first rank. A later call of `generate` with the
    longer sequence continues on it. Batches may be padded on the left. In one process it is a `DynamicCache`.

    Args:
        model: the model that generates, with a backend of ring_hf, after the processes have been set up (by
            `Accelerator(parallelism_config=ContextParallelConfig(...))` or a Trainer).
        min_sharded_tokens: inputs with fewer new tokens are computed by every rank. Default: 32 for each rank.

    Raises:
        ValueError: if the model has layers that this cache cannot hold, or generates without a cache
            (`generation_config.use_cache=False`), so that it would see every token again with each new one.
    """

    def __init__(self, model: Any, min_sharded_tokens: int | None = None) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(getattr(model, "generation_config", None), "use_cache", None) is False:
            raise ValueError(f"ContextParallelCache: model.generation_config: {WITHOUT_CACHE}")
        self.context = process.current()
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        if self.context is not None:
            check_model(model, layers)
            layers = [ShardedLayer(getattr(layer, "sliding_window", None)) for layer in layers]
            install_hooks(model)
            share_stopping(model)
            self.min_sharded_tokens = min_sharded_tokens or 32 * self.context.size
            self._num_tokens = [0] * self.context.size  # of each rank, in a layer without a window
            self._run_owner, self._run_left = 0, 0
        super().__init__(layers=layers)

    @property
    def num_local_bytes(self) -> int:
        """Bytes of the keys and values that this process keeps."""
        tensors = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def begin_step(self, num_tokens: int, row_starts: tuple[int, ...] | None) -> CacheStep:
        """Describe a forward pass over `num_tokens` new tokens to all layers, and return the description.

        Args:
            row_starts: per batch row the number of padded tokens at its start.

        Raises:
            ValueError: if the last pass has not ended, so that some layers hold more tokens than others.
        """
        if any(layer.step is not None for layer in self.layers):
            raise ValueError("The last pass over this ContextParallelCache failed. Make another one.")
        assert self.context is not None
        start, size = self.get_seq_length(), self.context.size
        sequence, owner = None, self._owner(num_tokens)
        if num_tokens >= self.min_sharded_tokens:
            length = padded_length("zigzag", num_tokens, size)
            documents = None
            if row_starts is not None and start == 0:
                documents = tuple((0, first, length) if first else (0, length) for first in row_starts)
            sequence = ShardedSequence("zigzag", length, size, documents)
            (owner,) = sequence.owners(num_tokens - 1, num_tokens - 1)
        context = self.context
        step = CacheStep(
            start, num_tokens, sequence, owner, row_starts, context.group, context.rank, context.options, self.layers
        )
        for layer in self.layers:
            layer.step = step
        return step

    def end_step(self, step: CacheStep) -> None:
        """Account the tokens of a pass to the ranks that keep their keys; the layers forget the pass."""
        for layer in self.layers:
            layer.step = None
        if step.sequence is None:
            self._num_tokens[step.owner] += step.num_tokens
            self._run_owner = step.owner
            self._run_left = (self._run_left if self._run_left > 0 else RUN_LENGTH) - step.num_tokens
            return
        self._run_left = 0
        for rank in range(len(self._num_tokens)):
            for segment in step.sequence.segments(rank):
                self._num_tokens[rank] += max(0, min(segment.length, step.num_tokens - segment.start))

    def _owner(self, num_tokens: int) -> int:
        if self._run_left > 0:
            return self._run_owner
        return min(range(len(self._num_tokens)), key=self._num_tokens.__getitem__)

    def reset(self) -> None:
        """Forget all tokens."""
        if self.context is not None:
            self._num_tokens = [0] * self.context.size
            self._run_left = 0
            for layer in self.layers:
                layer.step = None
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._refuse("beam search (num_beams > 1)")
        super().reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("assisted or speculative decoding, which takes tokens back")
        super().crop(*args, **kwargs)

    def activate_past_recording(self) -> None:
        self._refuse("assisted or speculative decoding, which takes tokens back")
        super().activate_past_recording()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("a search that repeats the rows of its cache")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._refuse("a search that selects rows of its cache")
        super().batch_select_indices(indices)

    def _refuse(self, method: str) -> None:
        if self.context is not None:
            raise ValueError(
                f"ContextParallelCache does not support {method}. Generate greedily or by sampling, or in one process."
            )
