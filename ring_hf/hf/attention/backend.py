"""The attention backends `ring_<layout>` and `ulysses` for `attn_implementation=...`.

Transformers calls one function per attention layer with queries and keys `[B, H, S, D]`, key and value heads not
repeated, and passes every model kwarg on to it. If the batch came from `ContextParallelCollator`, the kwarg
`context_parallel` describes the whole sequence and the tensors are this rank's shard of it: ring attention. Otherwise
the process holds the whole sequence: local attention, equal to `attn_implementation="sdpa"` (or "eager", if a model
has no other). An argument that would change the result and is not implemented raises an error.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dim, E value head dim.
"""

import functools
import inspect
from typing import Any

import torch
from torch.nn.functional import pad

from ring_hf.geometry import AttentionSpec
from ring_hf.parallel import num_processes, ring_attention

from .. import context
from ..attn_names import BACKENDS, attention_name
from ..batch_metadata import ContextParallelMetadata, InvalidBatch
from ..cache_step import CacheStep
from . import announcements, shard_errors
from .cached import cached_attention
from .local import local_attention_forward

# Arguments of attention layers in Transformers that change the result and that no kernel here computes. `sinks` is
# one score per query (Inkling), unlike `s_aux`, one per head.
UNSUPPORTED_KWARGS = ("position_bias", "sinks", "indices", "block_indices", "head_mask", "alibi", "cache")
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


class AttentionCallRecorder:
    """Records which modules call the backend with a shard, for the guard's proof that all attention layers do.

    Attributes:
        last_callers: the modules that called it in the last pass that was recorded to its end.
    """

    def __init__(self) -> None:
        self.on = False
        self.callers: list[torch.nn.Module] = []
        self.last_callers: list[torch.nn.Module] = []

    def start(self) -> None:
        self.on, self.callers = True, []

    def stop(self) -> list[torch.nn.Module]:
        self.on = False
        self.last_callers, self.callers = self.callers, []
        return self.last_callers


attention_calls = AttentionCallRecorder()


class KeySums:
    """Sums of the keys of this rank's shard, by layer of one forward pass: the first that is NaN or infinite tells
    which rank's activations were so first, since the next layer brings them to every rank."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []  # scalars; the host has not waited for them

    def record(self, key_BKCD: torch.Tensor) -> None:
        self.sums.append(key_BKCD.detach().sum(dtype=torch.float32))

    def find_first_nonfinite(self) -> int | None:
        """Return the number of the first call of attention whose keys were not finite, or None."""
        if not self.sums:
            return None
        is_finite = torch.stack(self.sums).isfinite().tolist()
        return None if all(is_finite) else is_finite.index(False)


key_sums = KeySums()


def mask_2d(
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the 2D padding mask `[B, S]` of the keys if it hides any, else None; never a 4D mask.

    This is the mask function of the backends. For packed rows it returns document numbers, because not every model
    passes position_ids to its attention layers. A 4D mask would be S x S, and built from sharded position ids it would
    mistake a zigzag shard for packed documents.

    Raises:
        ValueError: for static caches, masks that a model extends, and caches beyond one chunk.
    """
    end = int(q_offset) + q_length
    if kv_length + kv_offset > end:
        raise ValueError(
            f"A static cache ({kv_length} slots, {end} of them filled) is not supported by the "
            "ring backends. Generate with the default dynamic cache, or with attn_implementation='sdpa'."
        )
    if kwargs.get("use_vmap") or _is_union(kwargs.get("mask_function")):
        raise ValueError(
            "The model adds to its attention mask (tokens of one image that see each other, for example), which the "
            "ring backends do not compute. Use attn_implementation='sdpa'."
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and kwargs.get("local_size") == chunk and end > max(q_length, chunk):
        raise ValueError(
            f"A cache that reaches beyond one chunk of attention ({end} tokens, attention_chunk_size={chunk}) is not "
            "supported by the ring backends. Generate with attn_implementation='sdpa'."
        )
    packed = attention_mask is None and kwargs.get("allow_is_causal_skip") is False and q_length == kv_length > 1
    if packed and context.current() is None:  # on a shard, positions jump without a new document
        return _document_numbers(kwargs["mask_function"], kwargs["batch_size"], q_length, kwargs["device"])
    if attention_mask is None or attention_mask.ndim != 2:
        return attention_mask
    mask_BS = attention_mask[:, kv_offset : kv_offset + kv_length]
    return None if bool(mask_BS.all()) else mask_BS


def _document_numbers(mask_function: Any, num_rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Number the documents of each row, `[B, S]` of int64: one starts where a token cannot see the previous one."""
    rows_B1, token_S = torch.arange(num_rows, device=device)[:, None], torch.arange(length, device=device)
    sees_BS = mask_function(rows_B1, torch.zeros((), dtype=torch.long, device=device), token_S[1:], token_S[:-1])
    return pad((~sees_BS).expand(num_rows, -1).long().cumsum(1), (1, 0)) + 1


def _is_union(mask_function: Any) -> bool:
    """Return whether Transformers joined the causal mask with another one (`masking_utils.or_masks`).

    Transformers nests mask functions in closures, in an order that depends on its version: since 5.24 the packed
    documents are outermost.
    """
    pending, checked = [mask_function], []
    while pending:
        function = pending.pop()
        if "or_masks" in getattr(function, "__qualname__", ""):
            return True
        checked.append(function)  # a closure may refer to itself
        variables = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        for value in variables.values():
            nested = value if isinstance(value, tuple) else (value,)
            pending += [item for item in nested if inspect.isfunction(item) and item not in checked]
    return False


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    context_parallel: ContextParallelMetadata | CacheStep | InvalidBatch | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of one layer, `[B, S, H, E]`, and no weights.

    `query [B, H, S, D]`, `key [B, K, S, D]` and `value [B, K, S, E]` are this rank's shard if `context_parallel` is
    given. The signature is that of Transformers' attention interface.

    Raises:
        ValueError: for anything that would change the result and is not implemented.
    """
    if attention_calls.on and context_parallel is not None:
        attention_calls.callers.append(module)
    _refuse_unsupported(query, key, value, s_aux, kwargs)
    query, key, value = _cast_qkv(module, query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = sliding_window if sliding_window is not None else layer_window(module)
    if window is not None and not causal:
        raise ValueError(
            f"sliding_window={window} without a causal mask means a window on both sides in Transformers, which the "
            "ring backends do not compute. Use a causal model, or one without sliding windows."
        )
    spec = AttentionSpec(causal, window, layer_chunk(module), scaling, softcap or None)
    if context_parallel is None:
        _refuse_unguarded_training(module)
        out_BSHE = local_attention_forward(
            query, key, value, spec, s_aux, attention_mask, dropout, position_ids, cu_seq_lens_q
        )
        return out_BSHE, None
    if isinstance(context_parallel, CacheStep):
        return cached_attention(module, query, key, value, spec, s_aux, context_parallel), None
    if isinstance(context_parallel, InvalidBatch):
        raise ValueError(context_parallel.message)
    batch = context_parallel
    if batch.sequence.num_ranks > 1 and not announcements.is_announced(module, batch):
        raise ValueError(shard_errors.UNCHECKED_BATCH)
    _refuse_unshardable(module, query, key, attention_mask, dropout, batch)
    if module.training and batch.sequence.num_ranks > 1:  # the guard forgets them at the next pass of shards
        key_sums.record(key)
    out_BHSE, _ = ring_attention(
        _llama4_query_temperature(module, query, batch),
        key,
        value,
        sequence=batch.sequence,
        group=batch.group,
        spec=spec,
        options=batch.options,
        sinks=s_aux,
        return_lse=False,
    )
    return out_BHSE.transpose(1, 2).contiguous(), None


def _layer_type(module: torch.nn.Module) -> str | None:
    types, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return types[index] if types is not None and index is not None and index < len(types) else None


def layer_window(module: torch.nn.Module) -> int | None:
    """Return the window of a layer that passes it to its mask only (Qwen2-MoE)."""
    return module.config.sliding_window if _layer_type(module) == "sliding_attention" else None  # type: ignore


def layer_chunk(module: torch.nn.Module) -> int | None:
    """Return the chunk length of a layer that attends inside chunks, which it passes to its mask only (Llama 4).

    Raises:
        ValueError: if the layer does not say whether it is one of those.
    """
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    if chunk is None:
        return None
    kind = _layer_type(module)
    if kind is None:
        raise ValueError(
            f"attention_chunk_size={chunk}, but {type(module).__name__} does not say whether it is one of the layers "
            "that attend inside chunks (config.layer_types, layer_idx). Use attn_implementation='sdpa'."
        )
    return chunk if kind == "chunked_attention" else None


def _llama4_query_temperature(
    module: torch.nn.Module, query_BHCD: torch.Tensor, batch: ContextParallelMetadata
) -> torch.Tensor:
    """Rescale the queries `[B, H, C, D]` of Llama 4's layers without RoPE.

    Llama 4 scales them by their position, which it counts from 0 in the tensor it gets: replace the position in the
    shard by the position in the sequence.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query_BHCD
    positions = [position for segment in batch.sequence.segments(batch.rank) for position in segment.range]
    device, every, strength = query_BHCD.device, float(module.floor_scale), float(module.attn_scale)  # type: ignore

    def scale(positions_C: torch.Tensor) -> torch.Tensor:
        return torch.log1p(((positions_C + 1) / every).floor()) * strength + 1.0

    global_C = scale(torch.tensor(positions, dtype=torch.float32, device=device))
    local_C = scale(torch.arange(len(positions), dtype=torch.float32, device=device))
    return (query_BHCD * (global_C / local_C)[None, None, :, None]).to(query_BHCD.dtype)


def _refuse_unguarded_training(module: torch.nn.Module) -> None:
    """Raise ValueError if the model trains on whole sequences by mistake, without the guard that checks batches."""
    if not (module.training and torch.is_grad_enabled()):
        return
    if context.current() is not None and not announcements.is_guarded(module):
        raise ValueError(shard_errors.MISSING_METADATA)
    if not context.is_configured() and num_processes() > 1:
        name = attention_name(module.config) if hasattr(module, "config") else None
        raise ValueError(
            f"attn_implementation={name!r} trains in {num_processes()} processes, but no ContextParallelConfig says "
            "how they share sequences, so each would train on whole sequences of its own. Pass "
            "parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=...) to TrainingArguments (or to "
            "Accelerator); context_parallel_size=1 says that plain data parallelism is meant."
        )


def _refuse_unsupported(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    s_aux: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if s_aux is not None and s_aux.shape != (query.shape[1],):
        raise ValueError(
            f"s_aux (attention sinks) has shape {tuple(s_aux.shape)} for {query.shape[1]} query heads. The ring "
            "backends compute one sink per head. Use attn_implementation='eager'."
        )
    if kwargs.get("output_attentions"):
        raise ValueError(shard_errors.OUTPUT_ATTENTIONS)
    for name in UNSUPPORTED_KWARGS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"The attention layer passes {name!r}, which changes the result and is not computed by the ring "
                "backends."
            )
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads. Set num_attention_heads "
            "to a multiple of num_key_value_heads."
        )
    if query.shape[-1] != key.shape[-1] or key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"Queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit "
            "together."
        )


def _cast_qkv(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cast q, k and v to the dtype of the weights: layer norms that PEFT keeps in fp32 return fp32 in a bf16 model."""
    if query.dtype == key.dtype == value.dtype != torch.float32:
        return query, key, value
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    else:
        weights = (part.weight.dtype for part in module.modules() if isinstance(part, torch.nn.Linear))
        dtype = next((dtype for dtype in weights if dtype.is_floating_point), value.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@functools.cache
def chunks_begin_with_documents() -> bool:
    """Return whether Transformers counts the chunks of a packed row from the first token of each document."""
    from transformers import masking_utils  # at the top of this file it would be a circular import

    return hasattr(masking_utils, "remap_positions_for_packed_sequence")


def _refuse_unshardable(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    batch: ContextParallelMetadata,
) -> None:
    name = attention_name(module.config) if hasattr(module, "config") else None
    if name is not None and BACKENDS.get(name) != batch.sequence.layout:
        raise ValueError(shard_errors.layout_error(name, batch))
    # In one process with prefixes, document numbers repeat what its batch says. A 0 would hide a token.
    numbers = batch.sequence.num_ranks == 1 and attention_mask is not None and attention_mask.dtype == torch.int64
    if attention_mask is not None and not (numbers and attention_mask.ndim == 2 and bool((attention_mask > 0).all())):
        shape = tuple(attention_mask.shape)
        raise ValueError(shard_errors.attention_mask_error(f"An attention mask of shape {shape}"))
    if module.training and dropout > 0:
        raise ValueError(
            f"attention dropout {dropout} cannot equal one process: every rank would draw its own mask. Set "
            "config.attention_dropout = 0.0."
        )
    is_packed = any(len(bounds) > 2 for bounds in batch.sequence.documents or ())
    if is_packed and layer_chunk(module) is not None and not chunks_begin_with_documents():
        raise ValueError(shard_errors.CHUNKS_OF_PACKED_ROWS)
    if key.shape[2] != query.shape[2]:
        raise ValueError(shard_errors.kv_cache_error(f"{query.shape[2]} queries meet {key.shape[2]} keys"))
    if query.shape[2] != batch.shard_length:
        raise ValueError(shard_errors.shard_length_error(query.shape[2], batch))
    supported = DTYPES.get(query.device.type, ())
    if query.dtype not in supported:
        raise ValueError(
            f"Ring attention has no kernel for {query.dtype} on {query.device.type}. Use "
            f"{' or '.join(str(dtype) for dtype in supported) or 'a CPU or CUDA device'}."
        )
