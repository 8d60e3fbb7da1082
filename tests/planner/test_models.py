"""Models: their parameters against published counts and against the models that Transformers builds."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hf.planner import read_model
from ring_hf.planner.model_config import ARCHITECTURES, parse_config
from ring_hf.planner.model_table import MODEL_TABLE, _short_name, find_model_name

# Totals that the hub shows for each model; 256 numbers per layer of DeepSeek V3 are a buffer of the router.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "deepseek-ai/DeepSeek-V3": 671_026_419_200 - 58 * 256,
}


def count_built_parameters(config):
    """Return the number of parameters of the model that Transformers builds from a config.json, on the meta device."""
    values = {**config, "pad_token_id": 0}
    kind = values.pop("model_type")
    if kind == "qwen3_moe":  # its name in Transformers 5; files on the hub have num_experts
        values["num_local_experts"] = values["num_experts"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_count(name):
    assert read_model(name).parameters == PUBLISHED[name]


def test_every_known_model_has_the_parameters_of_transformers():
    for name, config in MODEL_TABLE.items():
        shallow = {**config, "num_hidden_layers": 4}
        assert parse_config(shallow, name, "").parameters == count_built_parameters(shallow), name
    assert len(MODEL_TABLE) >= 25


def test_the_largest_model_is_counted_with_all_layers():
    config = MODEL_TABLE["deepseek-ai/DeepSeek-V3"]
    assert parse_config(config, "", "").parameters == count_built_parameters(config)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_folder_is_read_as_transformers_reads_it(kind, tmp_path):
    values = {"num_experts_per_tok": 2} if "experts" in ARCHITECTURES[kind] else {}
    values |= {"head_dim": 128} if kind == "ministral" else {}  # no model can be built from its defaults
    config = AutoConfig.for_model(kind, num_hidden_layers=7, pad_token_id=0, **values)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parsed = read_model(str(tmp_path))
    assert parsed.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert parsed.layers == 7 and parsed.name == tmp_path.name and parsed.source == str(tmp_path / "config.json")
    assert read_model(str(tmp_path / "config.json")) == parsed
    window = getattr(config, "sliding_window", None)
    for layer, block in enumerate(model.model.layers):
        # Mistral, Mixtral and Phi 3 read it from the configuration in every layer.
        assert parsed.windows[layer] == (getattr(block.self_attn, "sliding_window", window) or None), (layer, kind)


def test_windows_of_known_models_are_those_of_transformers():
    for name in ("google/gemma-2-2b", "google/gemma-3-1b-it", "openai/gpt-oss-20b", "mistralai/Mistral-7B-v0.1"):
        config = dict(MODEL_TABLE[name])
        kinds = AutoConfig.for_model(config.pop("model_type"), **config).to_dict().get("layer_types")
        expected = [kind == "sliding_attention" for kind in kinds or ["sliding_attention"] * 32]
        assert [window is not None for window in read_model(name).windows] == expected


def test_active_parameters_are_those_of_one_token():
    model = read_model("Qwen/Qwen3-30B-A3B")
    dense = read_model("Qwen/Qwen3-8B")
    assert model.matmul_parameters + model.vocab * model.hidden == pytest.approx(
        3.35e9, rel=0.01
    )  # "A3B": 3.3B activated
    assert dense.matmul_parameters == dense.parameters - dense.vocab * dense.hidden - 36 * (2 * 4096 + 2 * 128) - 4096


def test_multi_head_latent_attention_has_heads_of_192_and_128():
    model = read_model("deepseek-ai/DeepSeek-V3")
    assert (model.kv_heads, model.head_dim, model.v_head_dim) == (128, 192, 128)
    assert sum(not sparse for sparse in model.sparse) == 3 and model.shared_ff == 2048


def test_names_match_in_any_case_without_organisation_or_suffix():
    assert len({_short_name(name) for name in MODEL_TABLE}) == len(MODEL_TABLE)
    for text in ("qwen3-8b", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", "QWEN3-8B"):
        assert find_model_name(text) == "Qwen/Qwen3-8B"
    assert find_model_name("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B"
    assert read_model("Llama-2-7b").source == "built-in table: config.json of meta-llama/Llama-2-7b-hf"


def test_the_text_part_of_multimodal_files_is_read(tmp_path):
    text = {key: value for key, value in MODEL_TABLE["google/gemma-3-1b-it"].items() if key != "model_type"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gemma3", "text_config": {**text, "model_type": "gemma3_text"}}))
    assert read_model(str(file)).parameters == PUBLISHED["google/gemma-3-1b-it"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type='mamba' .*the planner does not know its layers.* set model_type to",
        ),
        ({"model_type": "llama", "hidden_size": 8}, r"lacks num_hidden_layers, num_attention_heads, .*Pass the whole"),
    ],
)
def test_files_are_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


def test_errors_of_unknown_names_list_similar_names(tmp_path):
    with pytest.raises(
        ValueError, match=r"'Qwen/Qwen3-9B' is neither .*nothing is downloaded\. Similar names: .*Qwen3-8B"
    ):
        read_model("Qwen/Qwen3-9B")
    with pytest.raises(
        ValueError, match=r"Known names: meta-llama/Llama-2-7b-hf, .*pass its folder or its config\.json"
    ):
        read_model("zzzz")
    with pytest.raises(ValueError, match=r"has no config\.json\. Pass the folder that save_pretrained wrote"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ValueError, match=r"config\.json is not JSON: .*Pass a config\.json of Transformers"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json contains a list, not an object\. Pass a config\.json"):
        read_model(str(tmp_path))
