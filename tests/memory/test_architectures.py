"""Every exact family: each lever leaves loss and gradients of a step as they are, or is refused by message.

In fp64 and one process, against the model as it is. `REFUSED` names what is refused; all else must be exact.
"""

import copy
import functools
import re
import warnings

import pytest
import transformers

from ring_hf.memory import MemoryConfig, apply
from ring_hf.verify.model_families import EXACT, ROUTED, ROUTER_LOSS
from tests.harness import ROOT
from tests.memory.models import apart, batch, model_of, step

LEVERS = {
    "save": {"attention": "save", "ffn_block": None, "loss_block": None},
    "ffn": {"attention": "none", "ffn_block": 7, "loss_block": None},
    "loss": {"attention": "none", "ffn_block": None, "loss_block": 7},
    "all": {"attention": "save", "offload": "all", "ffn_block": 11, "loss_block": 13},
}
# Families by what is refused of them, with words of the message.
NOT_SAVED = {  # values of another head dim, in one process: PyTorch has no fused attention for them
    *("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"),
}
NO_CHECKPOINTS = {"ctrl", "jetmoe"}
NO_MODULE = {"bert", "bert/decoder", "electra", "electra/decoder", "ernie", "ernie/decoder", "opt", "roc_bert"}
SORTED = {"jetmoe", "llama4", "llama4_text"}
REFUSED = {
    "save": {
        **dict.fromkeys(NOT_SAVED, "no attention operator ran in the"),
        **dict.fromkeys(NO_CHECKPOINTS, "has no decoder layers that can be checkpointed"),
    },
    "ffn": {
        **dict.fromkeys(NO_MODULE, "has no feed-forward layer that is a module of its own"),
        **dict.fromkeys(SORTED, "are not known to treat each token by itself"),
    },
    "loss": {},
}
REFUSED["all"] = {**REFUSED["save"], **REFUSED["ffn"], "jetmoe": "has no decoder layers that can be checkpointed"}
TOGETHER = [
    "llama",
    "qwen3",
    "gemma2",
    "mixtral",
    "qwen3_moe",
    "phi",
    "cohere",
    "gpt_oss",
    "granite",
    "gpt2",
    "llama4",
]
IN_FP32 = {"beam": 2e-6}  # it computes logits and activations in fp32, also in an fp64 model


@functools.cache
def reference(name: str, **more):
    """The model, and what one step of it as it is comes to."""
    model = model_of(name, **more)
    return copy.deepcopy(model), step(model, batch())


def wrong(name: str, lever: str, **more) -> str | None:
    """What is wrong with a family under a lever: None if it is exact, or refused as the table says."""
    plain, wanted = reference(name, **more)
    model = copy.deepcopy(plain)
    try:
        apply(model, MemoryConfig(**LEVERS[lever]))
        far = apart(step(model, batch()), wanted)
    except ValueError as error:
        expected = REFUSED[lever].get(name)
        return None if expected and re.search(expected, str(error)) else f"{name}: {error}"
    if name in REFUSED[lever]:
        return f"{name} was not refused"
    return None if far <= IN_FP32.get(name, 1e-9) else f"{name}: {far:.1e}"


@pytest.mark.parametrize("lever", LEVERS)
def test_every_family_is_exact_or_refused(lever):
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = [wrong(name, lever) for name in (TOGETHER if lever == "all" else EXACT)]
    assert [message for message in found if message] == []
    assert set(REFUSED[lever]) <= set(EXACT)
    print(f"{lever}: {len(EXACT) - len(REFUSED[lever])} exact, {len(REFUSED[lever])} refused")


def test_auxiliary_losses_of_routers_are_unchanged():
    """The router stays whole: its logits are recorded once per layer, for all tokens, with gradients."""
    found = [wrong(name, "all", **ROUTER_LOSS) for name in ROUTED]
    assert [message for message in found if message] == []


def test_page_of_memory_options_counts_these_tables():
    text = " ".join((ROOT / "docs" / "memory.md").read_text().split())
    save, ffn, loss = (len(EXACT) - len(REFUSED[lever]) for lever in ("save", "ffn", "loss"))
    assert loss == len(EXACT)
    table = f"Of the {len(EXACT)} configurations in [the table of models](models.md)"
    assert f"{table}, one process finds saved attention exact for {save}," in text
    assert f"chunked feed-forward layers for {ffn} and the chunked loss for all" in text
