"""What `ring-hf doctor` and others read off a model without its weights."""

import json

import pytest

from ring_hf.hf.inspection import SHAPES, inspect_model, load_config

KINDS = {
    "llama-3-8b": [(32, 32, 8, 128, 128, None, None, None, False)],
    "gemma-2-9b": [(21, 16, 8, 256, 256, 4096, None, 50.0, False), (21, 16, 8, 256, 256, None, None, 50.0, False)],
    "gpt-oss-20b": [(12, 64, 8, 64, 64, 128, None, None, True), (12, 64, 8, 64, 64, None, None, None, True)],
    "deepseek-v3": [(61, 128, 128, 192, 128, None, None, None, False)],
}


@pytest.mark.parametrize("name", KINDS)
def test_attention_of_a_model_is_seen_without_its_weights(name):
    found = inspect_model(name, load_config(name), "ring_zigzag")
    assert found.probed and found.refused is None
    assert [(count, *vars(kind).values()) for kind, count in found.kinds] == KINDS[name]


def test_a_model_that_training_refuses_is_refused_with_its_message(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "num_hidden_layers": 1}))
    found = inspect_model("mine", load_config(str(tmp_path)), "ring_zigzag")
    assert found.refused is not None and "MambaForCausalLM" in found.refused
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "Transformers cannot build it" in inspect_model("t", load_config(str(tmp_path)), "ring_zigzag").refused


def test_a_broken_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no configuration that Transformers can read"):
        load_config(str(tmp_path))
    assert set(SHAPES) >= set(KINDS)
