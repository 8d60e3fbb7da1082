"""The cache that ranks share, as the code around a forward pass sees it."""

from typing import Any, Protocol

from .. import context as process
from ..cache_step import CacheStep


class SharedCache(Protocol):
    """What the hooks need of a `ContextParallelCache` that ranks share."""

    context: process.ProcessContext

    def get_seq_length(self) -> int: ...

    def begin_step(self, num_tokens: int, row_starts: tuple[int, ...] | None) -> CacheStep: ...

    def end_step(self, step: CacheStep) -> None: ...


def cache_of(kwargs: dict[str, Any]) -> SharedCache | None:
    """Return the cache among the arguments of a model or of `generate`, if ranks share it."""
    names = ("past_key_values", "cache")  # until Transformers 5.23, and since 5.24
    cache = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    return cache if cache is not None and hasattr(cache, "begin_step") and cache.context is not None else None
