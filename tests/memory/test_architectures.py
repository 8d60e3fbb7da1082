"""Every exact family: each option leaves the loss and gradients of a step unchanged, or is refused with a message.

In fp64 and one process, against the model without options. `REFUSED` names the refused families; all others must be
exact.
"""

import copy
import functools
import re
import warnings

import pytest
import transformers

from ring_hf.memory import MemoryConfig, apply
from ring_hf.verify.family_verdicts import installed_exact, installed_routed
from ring_hf.verify.model_families import EXACT, ROUTER_LOSS
from tests.memory.models import batch, model_of, relative_difference, step
from tests.support.harness import ROOT

OPTIONS = {
    "save": {"attention": "save", "ffn_block": None, "loss_block": None},
    "ffn": {"attention": "none", "ffn_block": 7, "loss_block": None},
    "loss": {"attention": "none", "ffn_block": None, "loss_block": 7},
    "all": {"attention": "save", "offload": "all", "ffn_block": 11, "loss_block": 13},
}
# Refused families, by option, with words of the message.
NOT_SAVED = {  # values of another head dim, in one process: PyTorch has no fused attention for them
    *("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"),
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
IN_FP32 = {"beam": 2e-6, "dory": 2e-6}  # they compute logits, and beam also activations, in fp32 in an fp64 model


@functools.cache
def reference(name: str, **more):
    """Return the model, and the loss and gradients of a step without options."""
    model = model_of(name, **more)
    return copy.deepcopy(model), step(model, batch())


def find_mismatch(name: str, option: str, **more) -> str | None:
    """Return why a family under an option is neither exact nor refused as the table says, or None."""
    plain, expected = reference(name, **more)
    model = copy.deepcopy(plain)
    try:
        apply(model, MemoryConfig(**OPTIONS[option]))
        difference = relative_difference(step(model, batch()), expected)
    except ValueError as error:
        refusal = REFUSED[option].get(name)
        return None if refusal and re.search(refusal, str(error)) else f"{name}: {error}"
    if name in REFUSED[option]:
        return f"{name} was not refused"
    return None if difference <= IN_FP32.get(name, 1e-9) else f"{name}: {difference:.1e}"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_family_is_exact_or_refused(option):
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    mismatches = [find_mismatch(name, option) for name in (TOGETHER if option == "all" else installed_exact())]
    assert [message for message in mismatches if message] == []
    assert set(REFUSED[option]) <= set(EXACT)
    print(f"{option}: of all releases {len(EXACT) - len(REFUSED[option])} exact, {len(REFUSED[option])} refused")


def test_auxiliary_losses_of_routers_are_unchanged():
    """The router stays whole: its logits are recorded once per layer, for all tokens, with gradients."""
    mismatches = [find_mismatch(name, "all", **ROUTER_LOSS) for name in installed_routed()]
    assert [message for message in mismatches if message] == []


def test_page_of_memory_options_counts_these_tables():
    text = " ".join((ROOT / "docs" / "memory.md").read_text().split())
    save, ffn, loss = (len(EXACT) - len(REFUSED[option]) for option in ("save", "ffn", "loss"))
    assert loss == len(EXACT)
    table = f"Of the {len(EXACT)} configurations in [the table of models](models.md)"
    assert f"{table}, one process finds saved attention exact for {save}," in text
    assert f"chunked feed-forward layers for {ffn} and the chunked loss for all" in text
