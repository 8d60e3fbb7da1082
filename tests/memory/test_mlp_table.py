"""The table of feed-forward classes is what the probe finds, and what it cannot know is tried or refused."""

import functools
import os
import warnings
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from ring_hf.doctor.machine import REQUIREMENTS
from ring_hf.memory import apply, declare_mlp, mlp_classes, mlp_lookup
from ring_hf.memory.mlp_classes import INNER_CLASSES, MLP_CLASSES, qualified_name
from ring_hf.memory.mlp_lookup import find_mlps
from ring_hf.verify.mlp_families import build, family_names, probe, token_wise_activations
from ring_hf.verify.model_families import EXACT
from tests.memory.models import batch, model_of, relative_difference, step
from tests.support.harness import load_script

TESTED_VERSION = next(package.tested_version for package in REQUIREMENTS if package.name == "transformers")
ALL = bool(os.environ.get("RING_HF_ALL_CASES"))
# What differs most: dense, experts, shared ones, containers, a cross-residual, several calls, norms, images.
SAMPLE = [
    *("llama", "gpt2", "ctrl", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "dbrx", "hrm_text", "bloom"),
    *("modernbert-decoder", "gemma3n_text", "persimmon", "deepseek_v4", "jetmoe", "llama4", "bert", "opt"),
    *("image-text/qwen2_vl", "image-text/gemma3"),
]
FFN = {"attention": "none", "ffn_block": 7, "loss_block": None}


@pytest.fixture(autouse=True)
def _quiet_and_undeclared(monkeypatch):
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    monkeypatch.setattr(mlp_classes, "_declared", {})


@functools.cache
def probed(name: str):
    """What the probe says of a family, and what the table finds in it: names of modules, or a refusal."""
    model = build(name)
    if model is None:
        return None
    with mock.patch.object(mlp_lookup, "record_calls", wraps=mlp_lookup.record_calls) as record:
        try:
            names = [mlp.name for mlp in find_mlps(model)]
        except ValueError as error:
            names = str(error)
    return probe(model), names, record.call_count


NAMES = family_names() if ALL else SAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_the_table_finds_what_the_probe_finds(name):
    result = probed(name)
    if result is None:
        assert name not in EXACT
        pytest.skip(f"{name} is not built by a small configuration")
    family, names, num_passes = result
    missing = family.specs.keys() - MLP_CLASSES.keys()
    if missing and transformers.__version__ != TESTED_VERSION:
        pytest.skip(f"this release of Transformers has classes that the table does not list: {', '.join(missing)}")
    for kind, spec in family.specs.items():
        known = MLP_CLASSES[kind]
        assert (known.token_dims, known.is_called_once) == (spec.token_dims, spec.is_called_once), kind
    assert family.inner_classes <= INNER_CLASSES
    if isinstance(names, str):
        refusals = ("has no feed-forward layer that is a module of its own", "are not known to treat", "drops values")
        assert any(words in names for words in refusals)
    else:
        assert names == family.module_names
        assert num_passes == (name == "ctrl")  # whose layers are containers, of which a class says nothing


@pytest.mark.skipif(not ALL, reason="builds every family of Transformers: RING_HF_ALL_CASES=1")
def test_the_script_would_write_the_same_table():
    script = load_script("update_mlp_table")
    families = [result[0] for name in NAMES if (result := probed(name)) is not None]
    assert len(families) >= 200
    source = script.TABLE.read_text()
    assert script.with_tables(source, script.format_tables(families, token_wise_activations())) == source, (
        "run: python scripts/update_mlp_table.py"
    )


def test_activations_are_functions_of_single_elements():
    assert token_wise_activations() <= INNER_CLASSES and len(MLP_CLASSES) >= 150


def test_known_classes_are_not_tried_on_the_model():
    for name in ("llama", "mixtral"):
        with mock.patch.object(mlp_lookup, "record_calls") as record:
            apply(model_of(name), **FFN)
        assert record.call_count == 0


class OwnMLP(nn.Module):
    """A feed-forward layer that nobody has heard of."""

    def __init__(self, mlp: nn.Module, strength: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.strength = mlp.up_proj, mlp.down_proj, strength

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).sin()
        return self.down(hidden - self.strength * hidden.mean(1, keepdim=True) if self.strength else hidden)


def with_own_mlp(strength: float = 0.0):
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp = OwnMLP(layer.mlp, strength)
    return model


def test_an_unknown_class_is_refused_until_it_is_declared():
    plain, model = with_own_mlp(), with_own_mlp()
    with pytest.raises(ValueError, match=r"whose parts are .*OwnMLP.*declare it first with ring_hf.memory.decl"):
        apply(model, **FFN)
    declare_mlp(with_own_mlp(), OwnMLP)
    assert len(apply(model, **FFN).feed_forward) == 2
    assert relative_difference(step(model, batch()), step(plain, batch())) <= 1e-10


def test_a_declaration_that_the_probe_refutes_fails_with_the_reason():
    with pytest.raises(ValueError, match=r"OwnMLP cannot be computed over blocks .*depends on other tokens"):
        declare_mlp(with_own_mlp(0.5), OwnMLP)
    with pytest.raises(ValueError, match="No OwnMLP is called in a pass of LlamaForCausalLM"):
        declare_mlp(model_of("llama"), OwnMLP)
    with pytest.raises(ValueError, match=r"Linear cannot be computed over blocks .*fewer than two matrices"):
        declare_mlp(model_of("llama"), nn.Linear)
    with pytest.raises(ValueError, match="has no feed-forward layer"):
        apply(with_own_mlp(), **FFN)


def test_a_declared_class_with_other_modules_inside_is_tried_again():
    declare_mlp(with_own_mlp(), OwnMLP)
    model = with_own_mlp()
    model.model.layers[1].mlp.up = nn.Sequential(model.model.layers[1].mlp.up, MeanOfTokens())
    with pytest.raises(ValueError, match=r"layers.1.mlp holds a Sequential .*depends on other tokens"):
        apply(model, **FFN)


class MeanOfTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


class LlamaMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    """The same name, another class."""

    def forward(self, x):
        return super().forward(x).cumsum(1)


def test_subclasses_are_unknown():
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = LlamaMLP
    with pytest.raises(ValueError, match="has no feed-forward layer"):
        apply(model, **FFN)


def mixing_hook(model):
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: output.cumsum(1))


def mixing_function(model):
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = lambda x: x.cumsum(1)


def quantized_by_a_subclass(model):
    class Rounded(nn.Parameter):
        pass

    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = Rounded(mlp.up_proj.weight.detach())


CHANGES = {
    "hook": (mixing_hook, "a hook (act_fn)", False),
    "function": (mixing_function, "a function of tests.memory.test_mlp_table (act_fn)", False),
    "parameter": (quantized_by_a_subclass, "a Rounded (up_proj)", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_known_class_that_was_changed_is_tried_on_the_model(name):
    change, words, is_token_wise = CHANGES[name]
    model = model_of("llama")
    change(model)
    mlp = model.model.layers[0].mlp
    assert mlp_lookup.find_change(mlp, MLP_CLASSES[qualified_name(type(mlp))]) == words
    if is_token_wise:
        assert len(find_mlps(model)) == 2
    else:
        with pytest.raises(ValueError, match="depends on other tokens"):
            find_mlps(model)


def test_a_forward_that_is_replaced_on_the_class_is_tried_on_the_model(monkeypatch):
    kind = type(model_of("llama").model.layers[0].mlp)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(original)(lambda self, x: original(self, x).cumsum(1)))
    with pytest.raises(ValueError, match=r"holds a forward of tests.*depends on other tokens"):
        find_mlps(model_of("llama"))


def test_experts_that_run_in_an_unproven_way_are_tried_on_the_model():
    model = model_of("mixtral")
    mlp = model.model.layers[0].mlp.experts
    spec = MLP_CLASSES[qualified_name(type(mlp))]
    assert mlp_lookup.find_change(mlp, spec) is None
    mlp.config._experts_implementation_internal = "deepgemm"
    assert mlp_lookup.find_change(mlp, spec) == "experts that run as deepgemm"


def test_a_module_that_is_called_with_other_arguments_is_computed_whole():
    """Batches of one token, tensors of another shape: the forward of the class runs as it is."""
    plain, model = model_of("llama"), model_of("llama")
    apply(model, **FFN)
    x = torch.randn(3, 2, 9, 32, dtype=torch.float64)
    for tokens in (x, x[0, 0, 0], x[0, :, :1]):
        assert torch.equal(model.model.layers[0].mlp(tokens), plain.model.layers[0].mlp(tokens))
    flat = x[0].flatten(0, 1)
    assert torch.allclose(model.model.layers[0].mlp(x=flat), plain.model.layers[0].mlp(flat), rtol=1e-12)
