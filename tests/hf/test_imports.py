"""Imports: packages load only their dependencies, and Transformers' models find the backends in any order."""

import sys
import textwrap

import pytest

import ring_hf
from ring_hf import doctor, hf
from ring_hf.exports import export_lazily
from tests.support.harness import run_command

# Module -> the lowest package that it may not load; torch stands below Transformers. All are imported in one process.
MUST_NOT_LOAD = {
    "ring_hf": "torch",
    "ring_hf.geometry": "torch",
    "ring_hf.planner": "torch",
    "ring_hf.doctor": "torch",
    "ring_hf.costmodel": "torch",
    "ring_hf.simulate": "torch",
    "ring_hf.cli": "torch",
    "ring_hf.launcher": "torch",
    "ring_hf.verify.verify_command": "torch",
    "ring_hf.memory": "transformers",
    "ring_hf.evaluation": "transformers",
    "ring_hf.kernels": "transformers",
    "ring_hf.parallel": "transformers",
    "ring_hf.hf.attention.backend": "transformers",
}


def run_python(code):
    return run_command([sys.executable, "-c", textwrap.dedent(code)]).stdout


def test_packages_load_only_their_dependencies():
    run_python(
        f"""
        import importlib, sys

        for name, forbidden in {MUST_NOT_LOAD!r}.items():
            importlib.import_module(name)
            loaded = {{"torch", "transformers", "accelerate", "matplotlib", "datasets"}} & set(sys.modules)
            allowed = set() if forbidden == "torch" else {{"torch"}}
            assert loaded <= allowed, f"{{name}} loads {{loaded - allowed}}"
        """
    )


COMMANDS = [
    ["--help"],
    ["plan", "--model", "Llama-3.1-8B", "--seq", "64K"],
    ["simulate", "--seq", "64K"],
]


def test_commands_on_plain_numbers_do_not_load_torch(tmp_path):
    commands = [*COMMANDS, ["show", "--seq", "4K", "--output", str(tmp_path / "picture.png")]]
    run_python(
        f"""
        import sys
        from ring_hf.cli import main

        for command in {commands!r}:
            try:
                assert main(command) == 0
            except SystemExit as end:
                assert end.code == 0
            loaded = {{"torch", "transformers", "accelerate"}} & set(sys.modules)
            assert not loaded, f"{{command}} loads {{loaded}}"
        """
    )


# Runs in a separate process after the imports of a test case.
CHECK_MODEL = """
import copy, importlib, inspect, pickle, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_utils, masking_utils
from ring_hf.hf.attn_names import BACKENDS

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
models = []
for name in ("sdpa", "ring_zigzag"):
    torch.manual_seed(0)
    models.append(AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation=name).eval())
tokens = torch.arange(8)[None]
assert torch.allclose(*(model(tokens).logits for model in models), atol=1e-6)
assert not any(name.startswith("ring_hf.hf.trainer.") for name in sys.modules), "the Trainer side is not needed yet"
"""
CHECK_TABLES = """
from ring_hf.hf.attention import backend
for name in BACKENDS:
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS[name] is backend.attention
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name] is backend.mask_2d
"""
CHECK_REST = (
    """
import ring_hf
assert inspect.getsource(modeling_utils) and inspect.getsource(masking_utils.create_causal_mask)
assert modeling_utils.__spec__.origin == modeling_utils.__file__
importlib.reload(modeling_utils), importlib.reload(masking_utils)
"""
    + CHECK_TABLES
    + """
from ring_hf import ContextParallelConfig, guard_model
config = ContextParallelConfig(context_parallel_size=1)
assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
assert type(config) is ring_hf.ContextParallelConfig is ring_hf.hf.ContextParallelConfig
assert pickle.loads(pickle.dumps(guard_model)) is ring_hf.guard_model
assert ring_hf.ContextParallelCollator.__module__ == "ring_hf.hf.collate.collator"
"""
)


@pytest.mark.parametrize(
    "imports",
    [
        "import ring_hf",
        # The Trainer loads the models: the backends are registered while `transformers.trainer` is executed.
        "import transformers, ring_hf.geometry\nfrom transformers.trainer import Trainer",
        "from transformers import AutoModelForCausalLM, Trainer\nimport ring_hf",
    ],
    ids=["before", "between", "after"],
)
def test_models_find_the_backends_in_any_import_order(imports):
    run_python("\n".join((imports, CHECK_MODEL, CHECK_TABLES, CHECK_REST)))


@pytest.mark.parametrize("package", [ring_hf, hf, doctor], ids=lambda package: package.__name__)
def test_public_names_are_listed_and_others_are_errors(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is getattr(package, name)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'shards'"):
        package.shards  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'shards'"):
        exec(f"from {package.__name__} import shards")


def test_a_name_is_loaded_once():
    load, names = export_lazily("ring_hf", {"parallel": ("shard",)})
    assert load("shard") is ring_hf.parallel.shard is vars(ring_hf)["shard"] and "shard" in names()
