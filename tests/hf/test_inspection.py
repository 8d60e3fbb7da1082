"""The attention layers of a model, read without its weights for `ring-hf doctor`."""

from dataclasses import replace

import pytest

from ring_hf.hf.checks.inspection import AttentionKind, inspect_model, load_config
from ring_hf.planner import read_config

# Number of layers of each kind, by model.
GEMMA_2 = AttentionKind(num_heads=16, num_kv_heads=8, head_dim=256, v_head_dim=256, softcap=50.0)
GPT_OSS = AttentionKind(num_heads=64, num_kv_heads=8, head_dim=64, v_head_dim=64, sinks=True)
KINDS = {
    "Llama-3.1-8B": [(AttentionKind(num_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128), 32)],
    "gemma-2-9b": [(replace(GEMMA_2, window=4096), 21), (GEMMA_2, 21)],
    "gpt-oss-20b": [(replace(GPT_OSS, window=128), 12), (GPT_OSS, 12)],
    "deepseek-v3": [(AttentionKind(num_heads=128, num_kv_heads=128, head_dim=192, v_head_dim=128), 61)],
}


@pytest.mark.parametrize("model_name", KINDS)
def test_attention_kinds_are_read_without_weights(model_name):
    keys, name, source = read_config(model_name)
    inspection = inspect_model(name, load_config(keys, source), "ring_zigzag")
    assert inspection.is_probed and inspection.error is None
    assert list(inspection.kinds) == KINDS[model_name]


def test_inspection_has_the_message_that_training_would_raise():
    config = load_config({"model_type": "mamba", "num_hidden_layers": 1}, "m")
    inspection = inspect_model("m", config, "ring_zigzag")
    assert inspection.error is not None and "MambaForCausalLM" in inspection.error
    inspection = inspect_model("t", load_config({"model_type": "t5"}, "t"), "ring_zigzag")
    assert "Transformers cannot build it" in inspection.error


def test_a_broken_config_is_refused():
    with pytest.raises(ValueError, match=r"mine/config\.json is not a config that Transformers can read"):
        load_config({}, "mine/config.json")
