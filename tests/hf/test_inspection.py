"""What `ring-hf doctor` and others read off a model without its weights."""

import pytest

from ring_hf.hf.checks.inspection import inspect_model, load_config
from ring_hf.planner import read_keys

KINDS = {
    "Llama-3.1-8B": [(32, 32, 8, 128, 128, None, None, None, False)],
    "gemma-2-9b": [(21, 16, 8, 256, 256, 4096, None, 50.0, False), (21, 16, 8, 256, 256, None, None, 50.0, False)],
    "gpt-oss-20b": [(12, 64, 8, 64, 64, 128, None, None, True), (12, 64, 8, 64, 64, None, None, None, True)],
    "deepseek-v3": [(61, 128, 128, 192, 128, None, None, None, False)],
}


@pytest.mark.parametrize("asked", KINDS)
def test_attention_of_a_model_is_seen_without_its_weights(asked):
    keys, name, source = read_keys(asked)
    found = inspect_model(name, load_config(keys, source), "ring_zigzag")
    assert found.probed and found.refused is None
    assert [(count, *vars(kind).values()) for kind, count in found.kinds] == KINDS[asked]


def test_a_model_that_training_refuses_is_refused_with_its_message():
    found = inspect_model("m", load_config({"model_type": "mamba", "num_hidden_layers": 1}, "m"), "ring_zigzag")
    assert found.refused is not None and "MambaForCausalLM" in found.refused
    found = inspect_model("t", load_config({"model_type": "t5"}, "t"), "ring_zigzag")
    assert "Transformers cannot build it" in found.refused


def test_a_broken_configuration_is_refused():
    with pytest.raises(ValueError, match=r"mine/config\.json is no configuration that Transformers can read"):
        load_config({}, "mine/config.json")
