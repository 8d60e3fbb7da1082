"""The `config.json` of well-known models, so that the planner can use them without a download.

The numbers are those of the file on the hub under the same name (litgpt's `config.py` has most of them, with links to
the files). `tests/planner/test_models.py` compares the resulting parameter counts with the published ones, and with
the model that Transformers builds from them.
"""

from typing import Any

_HEADS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIZES = (*_HEADS, "intermediate_size", "vocab_size")


def _config(model_type: str, *sizes: int, **extra: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True)), **extra}


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_QWEN_MOE = {"head_dim": 128, "num_experts_per_tok": 8, "num_experts": 128}
_GPT_OSS = {"head_dim": 64, "sliding_window": 128, "num_experts_per_tok": 4}
_DEEPSEEK = {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

# hidden size, layers, query heads, key/value heads, width of the MLP, vocabulary
MODEL_TABLE: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _config("llama", 4096, 32, 32, 32, 11008, 32000),
    "meta-llama/Llama-2-13b-hf": _config("llama", 5120, 40, 40, 40, 13824, 32000),
    "meta-llama/Llama-2-70b-hf": _config("llama", 8192, 80, 64, 8, 28672, 32000),
    "LargeWorldModel/LWM-Text-1M": _config("llama", 4096, 32, 32, 32, 11008, 32000),
    "meta-llama/Meta-Llama-3-8B": _config("llama", 4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.1-8B": _config("llama", 4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.1-70B": _config("llama", 8192, 80, 64, 8, 28672, 128256),
    "meta-llama/Llama-3.1-405B": _config("llama", 16384, 126, 128, 8, 53248, 128256),
    "meta-llama/Llama-3.2-1B": _config("llama", 2048, 16, 32, 8, 8192, 128256, head_dim=64, **_TIED),
    "meta-llama/Llama-3.2-3B": _config("llama", 3072, 28, 24, 8, 8192, 128256, head_dim=128, **_TIED),
    "meta-llama/Llama-3.3-70B-Instruct": _config("llama", 8192, 80, 64, 8, 28672, 128256),
    "Qwen/Qwen2.5-0.5B": _config("qwen2", 896, 24, 14, 2, 4864, 151936, **_TIED),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-14B": _config("qwen2", 5120, 48, 40, 8, 13824, 152064),
    "Qwen/Qwen2.5-32B": _config("qwen2", 5120, 64, 40, 8, 27648, 152064),
    "Qwen/Qwen2.5-72B": _config("qwen2", 8192, 80, 64, 8, 29568, 152064),
    "Qwen/Qwen3-0.6B": _config("qwen3", 1024, 28, 16, 8, 3072, 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-4B": _config("qwen3", 2560, 36, 32, 8, 9728, 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-8B": _config("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128),
    "Qwen/Qwen3-14B": _config("qwen3", 5120, 40, 40, 8, 17408, 151936, head_dim=128),
    "Qwen/Qwen3-32B": _config("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128),
    "Qwen/Qwen3-30B-A3B": _config("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, moe_intermediate_size=768, **_QWEN_MOE),
    "Qwen/Qwen3-235B-A22B": _config(
        "qwen3_moe", 4096, 94, 64, 4, 12288, 151936, moe_intermediate_size=1536, **_QWEN_MOE
    ),
    "mistralai/Mistral-7B-v0.1": _config("mistral", 4096, 32, 32, 8, 14336, 32000, sliding_window=4096),
    "mistralai/Mistral-7B-v0.3": _config("mistral", 4096, 32, 32, 8, 14336, 32768),
    "mistralai/Mixtral-8x7B-v0.1": _config(
        "mixtral", 4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "mistralai/Mixtral-8x22B-v0.1": _config(
        "mixtral", 6144, 56, 48, 8, 16384, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "google/gemma-2-2b": _config("gemma2", 2304, 26, 8, 4, 9216, 256000, head_dim=256, sliding_window=4096),
    "google/gemma-2-9b": _config("gemma2", 3584, 42, 16, 8, 14336, 256000, head_dim=256, sliding_window=4096),
    "google/gemma-2-27b": _config("gemma2", 4608, 46, 32, 16, 36864, 256000, head_dim=128, sliding_window=4096),
    "google/gemma-3-1b-it": _config("gemma3_text", 1152, 26, 4, 1, 6912, 262144, head_dim=256, sliding_window=512),
    "microsoft/Phi-3-mini-4k-instruct": _config("phi3", 3072, 32, 32, 32, 8192, 32064, sliding_window=2047),
    "microsoft/phi-4": _config("phi3", 5120, 40, 40, 10, 17920, 100352),
    "HuggingFaceTB/SmolLM3-3B": _config("smollm3", 2048, 36, 16, 4, 11008, 128256),
    "openai/gpt-oss-20b": _config("gpt_oss", 2880, 24, 64, 8, 2880, 201088, num_local_experts=32, **_GPT_OSS),
    "openai/gpt-oss-120b": _config("gpt_oss", 2880, 36, 64, 8, 2880, 201088, num_local_experts=128, **_GPT_OSS),
    "deepseek-ai/DeepSeek-V3": _config("deepseek_v3", 7168, 61, 128, 128, 18432, 129280, **_DEEPSEEK),
}

_ENDINGS = ("-instruct", "-base", "-chat", "-it", "-hf")


def _short_name(name: str) -> str:
    short = name.lower().rsplit("/", maxsplit=1)[-1].removeprefix("meta-")
    for ending in _ENDINGS:
        short = short.removesuffix(ending)
    return short


_BY_SHORT_NAME = {_short_name(name): name for name in MODEL_TABLE}


def find_model_name(text: str) -> str | None:
    """Return the table's name of a model, None if it is not in the table.

    Accepts a hub id with or without organisation, in any case, and names of tuned versions such as "-Instruct".
    """
    exact_match = next((name for name in MODEL_TABLE if name.lower() == text.lower()), None)
    return exact_match or _BY_SHORT_NAME.get(_short_name(text))
