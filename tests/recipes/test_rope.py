"""RoPE of an extended context: what Transformers computes from the parameters, over stages, and what is refused."""

import math

import pytest
import torch
from arguments import ModelArguments
from hypothesis import given
from hypothesis import strategies as st
from loading import set_positions
from rope import ntk_theta, resolve_rope, theta_bound, warn_about_theta
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ring_hf.hf.checks.model_rules import MODEL_RULES

SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**values):
    return AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 16, "max_position_embeddings": 64, **values})


def frequencies(description, max_length=256, config=None):
    """Return what a model computes with a description, and with the RoPE that it had."""
    config = llama() if config is None else config
    before = LlamaRotaryEmbedding(config).inv_freq
    set_positions(config, ModelArguments(model="a", rope_parameters=description), max_length)
    return LlamaRotaryEmbedding(config).inv_freq, before


@given(st.floats(1e3, 1e6), st.floats(1.0, 64.0), st.integers(2, 64))
def test_ntk_keeps_the_shortest_wavelength_and_stretches_the_longest(theta, factor, half):
    dim = 2 * half
    longest = [theta ** ((dim - 2) / dim), ntk_theta(theta, factor, dim) ** ((dim - 2) / dim)]
    assert longest[1] / longest[0] == pytest.approx(factor, rel=1e-9)


def test_transformers_computes_what_the_description_says():
    ntk, before = frequencies({"rope_type": "ntk", "factor": 4.0})
    assert ntk[0] == before[0] and ntk[-1] == pytest.approx(float(before[-1]) / 4, rel=1e-6)
    linear, _ = frequencies({"rope_type": "linear", "factor": 4.0})
    assert torch.allclose(linear, before / 4)
    for kind in ("yarn", "llama3"):
        scaled, _ = frequencies({"rope_type": kind})  # factor: 256 / 64
        assert scaled[0] == before[0] and scaled[-1] == pytest.approx(float(before[-1]) / 4, rel=1e-6)
        assert bool((scaled[1:] <= scaled[:-1]).all())
    base, _ = frequencies({"rope_theta": 1e6})
    assert base[1] == pytest.approx(1e6 ** (-1 / 8), rel=1e-6)


def test_a_factor_that_is_left_out_is_that_of_the_lengths():
    parameters = resolve_rope(llama(), {"rope_type": "yarn"}, 512)
    assert parameters["factor"] == 8.0 and parameters["original_max_position_embeddings"] == 64
    assert resolve_rope(llama(), {"rope_type": "yarn"}, 32)["factor"] == 1.0
    assert resolve_rope(llama(), parameters, 512) == parameters
    assert resolve_rope(llama(), {"rope_type": "ntk"}, 512) == {
        "rope_type": "default",
        "rope_theta": pytest.approx(1e4 * 8 ** (16 / 14)),
    }


def test_yarn_scales_from_the_base_length_also_after_a_stage():
    base = llama()
    last = llama()
    set_positions(last, ModelArguments(model="a", rope_parameters={"rope_type": "yarn"}), 256)
    assert last.max_position_embeddings == 256
    # From the last stage's configuration and from the base's: the same parameters.
    for config in (base, last):
        parameters = resolve_rope(config, {"rope_type": "yarn"}, 1024)
        assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (16.0, 64)
    # A stage that only changed the base leaves no trace of the length, so a driver passes the base's configuration.
    wide = llama()
    set_positions(wide, ModelArguments(model="a", rope_theta=1e6), 256)
    assert resolve_rope(wide, {"rope_type": "yarn"}, 1024)["original_max_position_embeddings"] == 256
    assert resolve_rope(base, {"rope_type": "yarn"}, 1024)["original_max_position_embeddings"] == 64
    # Phi-3 keeps its first length beside the parameters.
    phi = AutoConfig.for_model("phi3", original_max_position_embeddings=4096, max_position_embeddings=131072)
    assert resolve_rope(phi, {"rope_type": "yarn"}, 2**18)["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("kind", ["olmo3", "gemma3_text"])
def test_only_layers_of_one_type_are_extended(kind):
    types = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        kind, **SIZES, vocab_size=16, head_dim=16, pad_token_id=0, layer_types=types, max_position_embeddings=64
    )
    before = {name: dict(values) for name, values in config.rope_parameters.items()}
    description = {"full_attention": {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1}}
    set_positions(config, ModelArguments(model="a", rope_parameters=description), 512)
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    full = config.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"], full["original_max_position_embeddings"]) == ("yarn", 8.0, 64)
    assert full["rope_theta"] == before["full_attention"]["rope_theta"]
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary.rope_type == {"full_attention": "yarn", "sliding_attention": "default"}


@pytest.mark.parametrize(
    ("config", "description", "message"),
    [
        (llama(), {"rope_type": "dynamic"}, "largest position of each batch; .* Use rope_type ntk"),
        (llama(), {"rope_type": "yern"}, "'yern' is not known. Choose one of default, linear, ntk, yarn"),
        (llama(), {"rope_type": "linear", "beta_fast": 2}, "linear has no beta_fast. It has factor, rope_theta"),
        (llama(), {"full_attention": {"rope_theta": 1e6}}, "llama has a single RoPE for all layers"),
        (
            llama(),
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "only the largest of its shard. Set short_factor equal to long_factor",
        ),
        (AutoConfig.for_model("gpt2"), {"rope_theta": 1e6}, "a gpt2 configuration has no RoPE to set"),
        (
            AutoConfig.for_model("gemma3_text"),
            {"local": {"rope_theta": 1e6}},
            r"one RoPE per layer type \(.*\), and local is none of them. Write for example",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(config, description, message):
    with pytest.raises(ValueError, match=message):
        resolve_rope(config, description, 256)


def longrope(short, long):
    factors = {"short_factor": [short] * 8, "long_factor": [long] * 8, "factor": 4.0}
    return llama(
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            **factors,
        },
    )


@pytest.mark.parametrize(("factors", "is_exact"), [((2.0, 2.0), True), ((1.0, 2.0), False)])
def test_longrope_is_exact_on_shards_if_nothing_is_chosen(factors, is_exact):
    """The first of four contiguous shards ends below the length at which Transformers changes the factors."""
    positions = torch.arange(256)[None]
    x = torch.zeros(1, 1)
    whole, _ = LlamaRotaryEmbedding(longrope(*factors))(x, positions)
    shard, _ = LlamaRotaryEmbedding(longrope(*factors))(x, positions[:, :64])
    assert torch.equal(shard, whole[:, :64]) is is_exact
    config = longrope(*factors)
    config._attn_implementation = "ring_zigzag"
    messages = [message for rule in MODEL_RULES if (message := rule(LlamaForCausalLM(config)))]
    assert (messages == []) is is_exact
    assert is_exact or "longrope' chooses its frequencies by the largest position" in messages[0]


def test_the_bound_of_theta_is_the_published_one():
    published = {2**15: 9.5e5, 2**16: 2.9e6, 2**17: 9.1e6, 2**18: 2.8e7, 2**19: 8.7e7, 2**20: 2.7e8}
    for length, bound in published.items():
        assert float(f"{theta_bound(length):.2g}") == pytest.approx(bound, rel=0.03)


def test_a_base_below_the_bound_is_a_warning():
    assert warn_about_theta({"rope_type": "default", "rope_theta": 1e7}, 2**17) is None
    message = warn_about_theta({"rope_type": "default", "rope_theta": 1e7}, 2**18)
    assert message is not None and "rope_theta=1e+07 is below 2.8e+07" in message and "262,144 tokens" in message
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e7}
    assert warn_about_theta(linear, 2**18) is None and warn_about_theta(linear, 2**19) is not None
    assert warn_about_theta({"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}, 2**18) is None
    nested = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_type": "default", "rope_theta": 1e5}}
    assert warn_about_theta(nested, 4096) is None and math.isclose(theta_bound(1), 0.0424)
    assert warn_about_theta(nested, 2**17) is not None
    assert warn_about_theta({}, 2**17) is None
