"""Families of Transformers that differ in what an engine sees: tied heads, sinks, experts, biases, two head dims."""

from ring_hf.verify.model_families import EXACT

# Trained with all memory options that `tests/memory/test_architectures.py` does not show to be refused.
WITH_OPTIONS = [
    *(
        "cohere",
        "dots1",
        "ernie4_5_moe",
        "gemma2",
        "gemma3_text",
        "glm4_moe",
        "gpt2",
        "gpt_oss",
        "granite",
        "minimax_m2",
    ),
    *("mistral", "olmo2", "phi", "phi3", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
]
WITHOUT_OPTIONS = ["deepseek_v3", "llama4_text", "opt"]
BY_DEFAULT = {"FSDP2": "gpt_oss", "ZeRO-3": "gemma3_text"}
assert set(WITH_OPTIONS + WITHOUT_OPTIONS) <= set(EXACT)
