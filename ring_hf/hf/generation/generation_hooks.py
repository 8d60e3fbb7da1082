"""What happens around a forward pass over a `ContextParallelCache`: inputs are sharded, logits are made equal.

Before the pass, this rank's tokens of a long input are taken. After it, the logits of the last token are broadcast by
the rank that computed them, so that all ranks choose the same token from the same numbers. `generate` reads no others.
"""

import hashlib
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ring_hf.parallel import assert_equal_across_ranks, broadcast, cut, group_of

from .. import context as process
from ..batch_metadata import METADATA_KEY
from ..cache_step import CacheStep
from ..checks.argument_rules import first_error
from ..checks.model_rules import GENERATION_RULES
from .cache_protocol import SharedCache, cache_of
from .common_stop import GenerateCall

# Arguments of a forward pass that this cache understands. Any other tensor is refused, as its tokens would not be cut.
KNOWN_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "logits_to_keep"}
WITHOUT_CACHE = (
    "use_cache=False: generate would pass the whole sequence with every new token, after the keys that are in the "
    "cache already. Set model.generation_config.use_cache = True."
)
REFUSED_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")
_hooked_models: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


def check_model(model: Any, layers: Sequence[CacheLayerMixin]) -> None:
    """Check that a sharded cache can hold the layers of a model.

    Args:
        layers: of the `DynamicCache` that Transformers makes for it.

    Raises:
        ValueError: if it cannot.
    """
    config = model.config.get_text_config(decoder=True)
    error = first_error(GENERATION_RULES, model)
    others = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if error is None and (others or getattr(config, "attention_chunk_size", None)):
        names = ", ".join(sorted(others)) or "attention inside chunks"
        error = f"{type(model).__name__} needs a cache of other layers ({names}). Generate in one process."
    if error is None and getattr(config, "num_kv_shared_layers", None):
        error = f"{type(model).__name__} shares keys between layers. Generate in one process."
    if error is not None:
        raise ValueError(f"ContextParallelCache: {error}")


def install_hooks(model: torch.nn.Module) -> None:
    """Let a model shard its inputs whenever it is called with a `ContextParallelCache`; once per model."""
    if model not in _hooked_models:
        model.register_forward_pre_hook(_before_pass, with_kwargs=True)
        model.register_forward_hook(_after_pass, with_kwargs=True)
        _hooked_models.add(model)


def _before_pass(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    cache = cache_of(kwargs)
    if cache is None:
        return None
    group = cache.context.group
    error = _find_error(model, args, kwargs, cache)
    start = cache.get_seq_length()
    ids = kwargs.get("input_ids")
    row_starts: tuple[int, ...] | None = None
    if error is None:
        assert ids is not None
        try:
            row_starts = _row_starts(kwargs.get("attention_mask"), start, ids.shape[1])
        except ValueError as mask_error:
            error = str(mask_error)
    if start == 0 or ids is None or ids.shape[1] > 1:
        call = GenerateCall.of(model)
        values = {} if ids is None else {"input_ids": _fingerprint(ids), "the tokens in the cache": start}
        if call is not None:
            values |= call.settings
            error = error or call.error
        assert_equal_across_ranks(values, error, group_of(group))
    elif error is not None:  # of a decoded token, before which ranks exchange nothing
        raise ValueError(error)
    assert ids is not None
    if start == 0:
        _share_random_state(ids.device, group)
    step = cache.begin_step(ids.shape[1], row_starts)
    return args, {**kwargs, **_inputs_of_rank(model, kwargs, step), METADATA_KEY: step}


def _find_error(model: Any, args: tuple, kwargs: dict[str, Any], cache: SharedCache) -> str | None:
    if process.current() is not cache.context:
        return "The processes were set up anew since ContextParallelCache was made. Make another one."
    if args or kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
        return "A model with a ContextParallelCache is called with input_ids as a keyword argument, and no embeddings."
    if model.training:
        return "ContextParallelCache is for generation, and the model is in training mode. Call model.eval()."
    if kwargs.get("use_cache") is False:
        return WITHOUT_CACHE
    if kwargs.get("return_dict") is False:
        return "return_dict=False is not supported with a ContextParallelCache. Leave it out."
    for name in REFUSED_FLAGS:
        if kwargs.get(name):
            return f"{name}=True would return what one rank computes. Leave it out with a ContextParallelCache."
    unknown = [name for name, x in kwargs.items() if isinstance(x, torch.Tensor) and name not in KNOWN_ARGUMENTS]
    if unknown:
        return f"{', '.join(unknown)}: a ContextParallelCache shards input_ids only. Leave the argument out."
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim != 2:
        return f"position_ids of shape {tuple(positions.shape)} are not supported: pass one number per token."
    return None


def _row_starts(mask_BS: torch.Tensor | None, start: int, num_tokens: int) -> tuple[int, ...] | None:
    """Return the number of padded tokens at the start of each row; None without padding.

    Raises:
        ValueError: for a mask that is not left padding of the first tokens.
    """
    if mask_BS is None or bool(mask_BS.all()):
        return None
    if mask_BS.ndim != 2 or mask_BS.shape[1] != start + num_tokens:
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BS.shape)}, but the sequence has {start + num_tokens} tokens. Pass "
            "one number for each, those in the cache too."
        )
    first_B = mask_BS.int().argmax(dim=1)
    if not torch.equal(mask_BS.sum(dim=1), mask_BS.shape[1] - first_B):
        raise ValueError(
            "attention_mask has zeros after ones. ContextParallelCache supports padding on the left only: set "
            "tokenizer.padding_side='left'."
        )
    starts = tuple(first_B.tolist())
    if start == 0 and max(starts) >= num_tokens:
        raise ValueError("A row begins with a chunk of padding only. Raise prefill_chunk_size, or leave it out.")
    return starts


def _fingerprint(input_ids: torch.Tensor) -> str:
    data = input_ids.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return f"{tuple(input_ids.shape)} {hashlib.sha256(data).hexdigest()[:12]}"


def _share_random_state(device: torch.device, group: str) -> None:
    """Give all ranks the random state of the first one, so that all draw the same tokens."""
    torch.set_rng_state(broadcast(torch.get_rng_state(), group, 0))
    if device.type == "cuda":
        torch.cuda.set_rng_state(broadcast(torch.cuda.get_rng_state(device), group, 0), device)


def _inputs_of_rank(model: Any, kwargs: dict[str, Any], step: CacheStep) -> dict[str, Any]:
    """Return the arguments that change: tokens and positions of this rank, and the one token whose logits are read."""
    ids_BN, positions = kwargs["input_ids"], kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(step.start, step.start + step.num_tokens, device=ids_BN.device)[None]
    inputs: dict[str, Any] = {"attention_mask": None, "use_cache": True}
    index = step.num_tokens - 1
    if step.sequence is not None:
        padding = (0, step.sequence.length - step.num_tokens)
        shard = step.sequence.segments(step.rank)
        ids_BN = cut(pad(ids_BN, padding), shard)
        positions = cut(torch.cat([positions, positions[:, -1:].expand(-1, padding[1])], dim=1), shard)
        index = _local_index(step)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = torch.tensor([index], device=ids_BN.device)
    return {**inputs, "input_ids": ids_BN, "position_ids": positions}


def _local_index(step: CacheStep) -> int:
    """Return the index of the last token of the sequence in the shard of its owner."""
    assert step.sequence is not None
    offset = 0
    for segment in step.sequence.segments(step.owner):
        if segment.start <= step.num_tokens - 1 < segment.start + segment.length:
            return offset + step.num_tokens - 1 - segment.start
        offset += segment.length
    raise AssertionError("the owner holds the last token")


def _after_pass(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    step = kwargs.get(METADATA_KEY)
    if not isinstance(step, CacheStep):
        return output
    cache = cache_of(kwargs)
    assert cache is not None
    logits_BNV = output.logits
    if logits_BNV.shape[1] > 1:
        index = _local_index(step) if step.sequence is not None else step.num_tokens - 1
        logits_BNV = logits_BNV[:, index : index + 1]
    source = step.owner if step.sequence is not None else 0
    output.logits = broadcast(logits_BNV, step.group, source)
    cache.end_step(step)
    return output
