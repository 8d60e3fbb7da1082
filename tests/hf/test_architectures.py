"""Every causal language model of Transformers is exact under context parallelism, or refused before it computes.

For each family of `model_families.EXACT`, an unmodified Trainer takes one optimizer step of two micro-batches in two
processes that share padded sequences. Its logits, logged loss and gradients of all parameters must equal those of the
same Trainer in one process, with Transformers' own "eager" attention and with the ring backend. Calling the model
directly would not suffice: the Trainer decides whether a model gets the number of targets.
"""

import re
import sys

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ring_hf.doctor.machine import REQUIREMENTS
from ring_hf.hf.checks.argument_rules import first_error
from ring_hf.hf.checks.model_rules import MODEL_RULES
from ring_hf.hf.runtime import proven_classes
from ring_hf.verify.family_verdicts import (
    exact_classes,
    exact_families,
    installed_differing,
    installed_exact,
    installed_refused,
    installed_routed,
    refused_families,
)
from ring_hf.verify.model_families import (
    EXACT,
    NO_COUNT,
    REASONS,
    REFUSED_BEFORE,
    ROUTER_LOSS,
    UNTESTED,
    dropouts,
    refused,
    tiny,
)
from tests.hf.family_comparison import Results, check, compare
from tests.support.harness import ROOT, run_command, run_distributed

TESTED_VERSIONS = {requirement.name: requirement.tested_version for requirement in REQUIREMENTS}


def test_exact_families_equal_one_process():
    names = installed_exact()
    results = run_distributed(2, compare, names, {}, timeout=300)
    check(results, names)
    for differences in results:
        assert [name for name in names if not differences[name].is_counted] == NO_COUNT


DIFFERING = installed_differing()


@pytest.mark.skipif(not DIFFERING, reason=f"every class is exact in Transformers {transformers.__version__}")
def test_the_trial_step_refuses_classes_that_differ_in_this_release():
    for results in run_distributed(2, compare, DIFFERING, {}, timeout=60):
        for name in DIFFERING:
            assert str(results[name]).startswith("ValueError: A trial step on "), f"{name}: {results[name]}"


def test_proven_classes_are_those_that_are_compared():
    assert exact_classes() == proven_classes.PROVEN_CLASSES, "run: python scripts/update_model_table.py"


def compare_unproven_llama(rank: int, world_size: int) -> Results:
    """Run `compare` with Llama removed from the proven classes."""
    original = proven_classes.PROVEN_CLASSES
    proven_classes.PROVEN_CLASSES = original - {"LlamaForCausalLM"}
    try:
        return compare(rank, world_size, ["llama", "mistral"], {})
    finally:
        proven_classes.PROVEN_CLASSES = original


def test_comparison_detects_a_trial_step():
    for results in run_distributed(2, compare_unproven_llama, timeout=60):
        assert results["llama"] == "AssertionError: 4 forward passes, not 2: a trial step was taken"
        assert not isinstance(results["mistral"], str)


def test_every_family_of_transformers_has_a_verdict():
    """An older release lacks some families of the tables; the one of the development environment has all of them."""
    exact = exact_families()
    verdicts = [exact, set(refused_families()), set(UNTESTED)]
    families = set.union(*verdicts)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= families
    assert sum(map(len, verdicts)) == len(families), "a family has two verdicts"
    assert len(exact) >= 100 and set(REFUSED_BEFORE) <= exact
    if transformers.__version__ == TESTED_VERSIONS["transformers"]:
        assert families == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        assert set(installed_exact()) == set(EXACT) and installed_refused() == refused_families()


@pytest.mark.parametrize("reason", REASONS)
def test_refused_families_get_the_reason(reason):
    failures = []
    for family, family_reason in installed_refused().items():
        if family_reason == reason:
            message = refusal_of(family)
            if not re.search(REASONS[reason].message, message):
                failures.append(f"{family}: {message}")
    assert not failures, "\n".join(failures)
    assert set(refused_families().values()) == set(REASONS)


def refusal_of(family: str) -> str:
    """Return the message of the rules, or the error with which Transformers fails to build the model."""
    try:
        return first_error(MODEL_RULES, refused(family)) or "accepted"
    except (AttributeError, KeyError, StrictDataclassFieldValidationError) as error:
        return f"{type(error).__name__}: {error}"


def test_page_of_models_shows_these_tables():
    run_command([sys.executable, "scripts/update_model_table.py", "--check"])
    text = (ROOT / "docs" / "models.md").read_text()
    assert f"{len(exact_families())} families exact ({len(EXACT)} configurations)" in text
    assert all(name in text for name in [*EXACT, *refused_families(), *UNTESTED])


def test_default_dropout_is_refused_before_anything_is_computed():
    """All families whose default config has any dropout."""
    num_checked, failures = 0, []
    for name in installed_exact():
        default = CONFIG_MAPPING[name.split("/")[0]]()
        active = {key: value for key, value in dropouts(default).items() if value > 0}
        if active and "/" not in name:
            num_checked += 1
            with torch.device("meta"):
                message = first_error(MODEL_RULES, tiny(name, "ring_zigzag", dropout=True))
            if message is None or "drop" not in message:
                failures.append(f"{name} with {active}: {message}")
    assert not failures, "\n".join(failures)
    assert num_checked >= 10


def test_auxiliary_losses_of_routers_are_those_of_the_whole_sequence():
    """Losses and gradients, without padding, of all families with a router loss; its coefficient is large enough."""
    names = installed_routed()
    results = run_distributed(2, compare, names, ROUTER_LOSS, timeout=100)
    check(results, names)
    for name in names:
        assert all(differences[name].aux_loss for differences in results), f"{name} has no auxiliary loss"
