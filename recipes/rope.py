"""RoPE of an extended context: complete `rope_parameters` of Transformers 5 from a short description.

    {rope_theta: 1.0e+6}                    the base alone ("adjusted base frequency", Xiong et al. 2023, 2309.16039)
    {rope_type: linear, factor: 4}          positions / 4 (Chen et al. 2023, 2306.15595)
    {rope_type: ntk, factor: 4}             theta * 4 ** (d / (d - 2)): "NTK-aware", of which only the base remains
    {rope_type: yarn, factor: 8}            Peng et al. 2023, 2309.00071
    {rope_type: llama3, factor: 8}          Llama 3.1, with its defaults for low and high frequencies
    {full_attention: {rope_type: yarn}}     only the layers of one type; the other types keep what they have

A description changes the RoPE of the *base* model: the length that YaRN, linear and NTK-aware scaling start from is
the one that the base was trained for, also after several stages. A factor that is left out is the context length over
that length. d: rotated dims of a head.
"""

from typing import Any

# The keys of each type besides rope_type and rope_theta.
_SCALED = {"factor", "original_max_position_embeddings"}
KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "ntk": {"factor"},
    "yarn": _SCALED | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": _SCALED | {"low_freq_factor", "high_freq_factor"},
    "longrope": _SCALED | {"attention_factor", "short_factor", "long_factor"},
}
DEFAULTS: dict[str, dict[str, float]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
_KEPT = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")  # which dims are rotated, by which positions
_FACTORS = {"linear", "ntk", "yarn", "llama3", "longrope"}


def theta_bound(length: int) -> float:
    """Return the smallest RoPE base for a context of `length` tokens by Xu et al. 2024 (2405.14591), their figures
    fitted by `0.0424 * length ** 1.628`."""
    return 0.0424 * float(length) ** 1.628


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """Return the base that stretches the longest wavelength by `factor` and leaves the shortest as it is."""
    return float(theta * factor ** (rotary_dim / (rotary_dim - 2)))


def original_length(config: Any, parameters: dict[str, Any]) -> int:
    """Return the context length that a model's RoPE had before any scaling."""
    length = parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(length or config.max_position_embeddings)


def resolve_rope(config: Any, description: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Return complete `rope_parameters` for a context of `max_length` tokens.

    Args:
        config: configuration of the base model; not changed.
        description (`dict`): see the head of this module. Complete parameters are returned unchanged.
        max_length (`int`): the context length to train at.

    Raises:
        ValueError: if the model has no RoPE, or one per layer type and the description is for all layers or the
            reverse; if a type or key is not known; or if the type cannot be computed on shards.
    """
    current = getattr(config, "rope_parameters", None)
    if not current:
        raise ValueError(f"{description}: a {config.model_type} configuration has no RoPE to set. Leave it out.")
    layer_types = [key for key, value in current.items() if isinstance(value, dict)]
    described = [key for key, value in description.items() if isinstance(value, dict)]
    if not layer_types and described:
        raise ValueError(
            f"{description}: {config.model_type} has a single RoPE for all layers, none of {', '.join(described)} "
            "alone. Give its parameters without the layer type."
        )
    if not layer_types:
        return resolve_type(config, current, description, max_length)
    unknown = [key for key in description if key not in layer_types]
    if unknown:
        raise ValueError(
            f"{description}: {config.model_type} has one RoPE per layer type ({', '.join(layer_types)}), and "
            f"{', '.join(unknown)} is none of them. Write for example {{{layer_types[-1]}: {{rope_theta: 1.0e+6}}}}."
        )
    changed = {key: resolve_type(config, current[key], description[key], max_length) for key in described}
    return {**current, **changed}


def resolve_type(config: Any, current: dict[str, Any], description: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Return the complete parameters of one RoPE; `current` is that of the base model."""
    kind = description.get("rope_type", current.get("rope_type", "default"))
    check_type(kind, description)
    result: dict[str, Any] = {key: current[key] for key in _KEPT if key in current}
    if "rope_type" not in description:
        result = dict(current)  # only some of its numbers change
    result |= DEFAULTS.get(kind, {}) if "rope_type" in description else {}
    result |= {"rope_type": kind, "rope_theta": float(current["rope_theta"])} | description
    original = int(result.get("original_max_position_embeddings") or original_length(config, current))
    if kind in _FACTORS and result.get("factor") is None:
        result["factor"] = max(1.0, max_length / original)
    if kind == "ntk":
        rotary_dim = int(head_dim(config) * current.get("partial_rotary_factor", 1.0))
        theta = ntk_theta(result["rope_theta"], result.pop("factor"), rotary_dim)
        result |= {"rope_type": "default", "rope_theta": theta}
    elif "original_max_position_embeddings" in KEYS.get(kind, ()):
        result["original_max_position_embeddings"] = original
    return result


def check_type(kind: str, description: dict[str, Any]) -> None:
    """Raise if a type of RoPE cannot be trained on shards, or a key does not belong to it.

    Raises:
        ValueError: with the reason and the way out.
    """
    if kind == "dynamic":
        raise ValueError(
            f"{description}: rope_type dynamic computes its frequencies from the largest position of each batch; "
            "ranks hold different positions, and a model would be trained with other frequencies at every length. "
            "Use rope_type ntk, the same formula at a fixed factor."
        )
    if kind not in KEYS:
        if "rope_type" not in description:
            return  # a type of the model's own, of which only numbers change
        raise ValueError(f"{description}: rope_type {kind!r} is not known. Choose one of {', '.join(KEYS)}.")
    unknown = set(description) - KEYS[kind] - {"rope_type", "rope_theta", *_KEPT}
    if unknown:
        allowed = ", ".join(sorted(KEYS[kind] | {"rope_theta"}))
        raise ValueError(f"{description}: rope_type {kind} has no {', '.join(sorted(unknown))}. It has {allowed}.")
    if kind == "longrope" and description.get("short_factor") != description.get("long_factor"):
        raise ValueError(
            "rope_type longrope takes short_factor or long_factor by the largest position of a batch; a rank sees "
            "only the largest of its shard. Set short_factor equal to long_factor: a stage of long sequences trains "
            "with the long factors anyway."
        )


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def warn_about_theta(parameters: dict[str, Any], max_length: int) -> str | None:
    """Return a warning if the base of RoPE is below the published bound for the length, or None.

    The bound is for the base alone, or with positions divided by a factor (linear). YaRN, llama3 and longrope divide
    only some frequencies, which it does not cover. Of several layer types, only full attention sees the whole length.
    """
    nested = any(isinstance(value, dict) for value in parameters.values())
    rope = parameters.get("full_attention") if nested else parameters
    if not rope or rope.get("rope_type", "default") not in ("default", "linear"):
        return None
    reach = max_length / rope.get("factor", 1.0) if rope.get("rope_type") == "linear" else float(max_length)
    bound = theta_bound(int(reach))
    if rope["rope_theta"] >= bound:
        return None
    return (
        f"rope_theta={rope['rope_theta']:.3g} is below {bound:.2g}, the published lower bound for a context of "
        f"{int(reach):,} tokens (0.0424 * length ** 1.628, arXiv 2405.14591). Published recipes are on both sides of "
        "it; a larger base is the safer choice."
    )
