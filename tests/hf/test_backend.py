"""The backends in one process: their names are registered, and they compute the same as `sdpa`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ring_hf.geometry import LAYOUTS
from ring_hf.hf.attention import backend
from ring_hf.hf.attention.backend import attention
from ring_hf.hf.attn_names import BACKENDS
from ring_hf.testing import assert_close
from ring_hf.verify.model_families import tiny
from tests.hf.models import llama, mistral

TOKENS = torch.randint(1, 64, (2, 32), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 32, dtype=torch.long)
LEFT[1, :7] = 0
RIGHT = torch.ones(2, 32, dtype=torch.long)
RIGHT[1, 20:] = 0
PACKED = torch.cat([torch.arange(10), torch.arange(22)])[None].expand(2, -1)
MODELS = {"llama": llama, "mistral": mistral}
# Softcap and a window, sinks, another value head dim, chunks, a window that only the mask has.
OTHER_FAMILIES = ("gemma2", "gpt_oss", "deepseek_v3", "llama4_text", "qwen2_moe")


def pair(name):
    """Return two models of equal weights: with Transformers' attention (sdpa, or eager) and with a ring backend."""
    if name in OTHER_FAMILIES:
        return tiny(name, "eager").float().eval(), tiny(name, "ring_zigzag").float().eval()
    return MODELS[name]("sdpa").eval(), MODELS[name]("ring_zigzag").eval()


def test_names_are_registered_and_do_not_trigger_other_backends():
    assert set(BACKENDS) == {*(f"ring_{layout}" for layout in LAYOUTS), "ulysses"} and len(BACKENDS) == 5
    for name in BACKENDS:
        assert name in ALL_ATTENTION_FUNCTIONS and name in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
        assert not any(part in name for part in ("flash", "sdpa", "flex_attention", "/"))


def test_every_api_selects_a_backend_and_none_saves_it(tmp_path):
    model = llama("sdpa")
    model.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="ring_striped")
    assert loaded.config._attn_implementation == "ring_striped"
    built = LlamaForCausalLM._from_config(model.config, attn_implementation="ring_contiguous")
    assert built.config._attn_implementation == "ring_contiguous"
    model.set_attn_implementation("ring_zigzag")
    model.save_pretrained(tmp_path / "ring")
    assert "ring" not in json.dumps(json.loads((tmp_path / "ring" / "config.json").read_text()))


@pytest.mark.parametrize("name", [*MODELS, *OTHER_FAMILIES])
@pytest.mark.parametrize(
    ("padding", "inputs"),
    [
        ("plain", {}),
        ("packed", {"position_ids": PACKED, "use_cache": False}),
        ("right-padded", {"attention_mask": RIGHT}),
        ("left-padded", {"attention_mask": LEFT}),
    ],
)
def test_one_process_equals_transformers(name, padding, inputs):
    if (name, padding) == ("gpt_oss", "packed"):
        pytest.skip("Transformers lets packed documents of gpt-oss attend to each other; the next test covers it")
    plain, ring = pair(name)
    logits, gradients = [], []
    mask = inputs.get("attention_mask", torch.ones_like(TOKENS)).bool()
    labels = TOKENS.masked_fill(~(mask & mask.roll(1, dims=1)), -100)  # nothing is predicted from a padding token
    for model in (plain, ring):
        out = model(input_ids=TOKENS, labels=labels, **inputs)
        out.loss.backward()
        logits.append(out.logits[mask].detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(f"{name} {padding} logits", logits[1], logits[0], rms=2e-6)
    assert_close(f"{name} {padding} gradients", gradients[1], gradients[0], rms=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "deepseek_v3"])
def test_packed_documents_do_not_see_each_other(name):
    model = pair(name)[1]
    packed = model(input_ids=TOKENS, position_ids=PACKED, use_cache=False).logits[:, 10:]
    separate = model(input_ids=TOKENS[:, 10:], use_cache=False).logits
    as_one_document = model(input_ids=TOKENS, use_cache=False).logits[:, 10:]
    assert_close("second document", packed, separate, rms=2e-6)
    assert (packed - as_one_document).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*MODELS, *(name for name in OTHER_FAMILIES if name != "llama4_text")])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left-padded"])
def test_greedy_generation_equals_transformers(name, mask):
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain, ring = (model.generate(input_ids=TOKENS, attention_mask=mask, **settings) for model in pair(name))
    assert plain.shape == (2, 52) and torch.equal(plain, ring)


@pytest.mark.parametrize("name", list(MODELS))
def test_chunked_prefill_equals_one_pass(name):
    model = MODELS[name]("ring_zigzag").eval()
    with torch.no_grad():
        whole = model(input_ids=TOKENS).logits
        first = model(input_ids=TOKENS[:, :13], use_cache=True)
        second = model(input_ids=TOKENS[:, 13:], past_key_values=first.past_key_values).logits
    assert_close(f"{name} second chunk", second, whole[:, 13:], rms=2e-6)


def test_generating_beyond_one_chunk_of_attention_is_refused():
    with pytest.raises(ValueError, match="reaches beyond one chunk of attention"):
        tiny("llama4_text", "ring_zigzag").generate(input_ids=TOKENS[:, :8], max_new_tokens=4, pad_token_id=0)


def test_bf16_is_as_close_to_fp32_as_sdpa():
    plain, ring = pair("llama")
    expected = plain(input_ids=TOKENS).logits.float()
    differences = [model.bfloat16()(input_ids=TOKENS).logits.float() - expected for model in (plain, ring)]
    errors = [difference.square().mean().sqrt() for difference in differences]
    print(f"bf16 error: sdpa {errors[0]:.3e}, ring {errors[1]:.3e}")
    assert errors[1] <= 2 * errors[0]


def test_fp32_queries_of_a_bf16_layer_return_to_bf16():
    """PEFT keeps layer norms in fp32, which makes fp32 queries."""
    model = llama("ring_zigzag").bfloat16().eval()
    layer = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    out, weights = attention(layer, query, key, key, None, scaling=0.3)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 6, 4, 8) and weights is None


def test_union_of_masks_is_seen_however_transformers_nests_it():
    numbers = torch.zeros(1, 4)
    union = or_masks(causal_mask_function, lambda *indices: True)
    packed = packed_sequence_mask_function(numbers)
    assert backend._is_union(union) and backend._is_union(and_masks(union, packed))  # before and since 5.24
    assert not backend._is_union(and_masks(causal_mask_function, packed))
    assert not backend._is_union(sliding_window_causal_mask_function(3))

    def recursive(*indices):
        return recursive

    assert not backend._is_union(recursive)
