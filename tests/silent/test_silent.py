"""Cases that were silently wrong, hung or were refused late are exact, or refused by all ranks with one message.

Where a case may be either, `REFUSED` lists those that are refused, so that an exact case does not become a refusal
unnoticed. By default, the listed cases and one more of each kind run. RING_HF_ALL_CASES=1 runs all (six minutes), and
`python -m tests.silent.report FOLDER` prints them as a table. Cases that need TRL run where it is installed.
"""

import os
from importlib.util import find_spec

import pytest

from tests.silent.cases import CASES, EITHER, KINDS
from tests.silent.report import classify, launch

REFUSED = {
    1: ("shuffled_stream", "hardest_rows_first", "generator_of_the_system"),
    2: (
        *("weighted_cross_entropy", "focal_loss", "z_loss", "adalora", "entropy_bonus", "repetition_penalty"),
        *("hidden_states_by_hook", "largest_activation_by_hook", "flooding", "clamped_loss", "scaled_by_rows"),
        *("distillation", "second_backward", "clipped_gradient_by_hook", "own_training_step", "shadow"),
        "loss_function_of_the_trainer",
    ),
    3: ("count_of_its_own_batch", "loop_with_count_of_a_shard", "loop_of_plain_pytorch"),
    4: (
        *("multi_token_prediction", "own_cross_entropy", "later_tokens_weigh_more", "answers_only", "pooled_head"),
        *("contrastive_neighbours", "token_shift", "positions_of_its_own", "smoothed_labels_inside"),
        "noise_in_the_model",
    ),
    5: ("adaption_prompt", "adalora_evaluated", "wrapper_that_calls_forward", "wrapper_that_calls_the_decoder"),
    6: (
        *("activated_lora", "prompt_of_first_tokens", "after_a_separator", "counts_of_tokens", "pairs_of_tokens"),
        *("mask_by_hook", "one_token_at_a_time"),
    ),
    7: ("padded_to_max_length", "labels_filled_with_the_pad_token", "two_ends_of_text", "padded_in_evaluation"),
    11: ("sft_packed",),
}
NUM_UNLISTED = 1  # cases of each kind, in addition to the listed ones


def select_cases():
    runnable = [case for case in CASES if not case.needs_trl or find_spec("trl") is not None]
    if os.environ.get("RING_HF_ALL_CASES"):
        return runnable
    unlisted = {item: [case for case in runnable if case.item == item and not case.listed] for item in KINDS}
    return [case for case in runnable if case.listed or case in unlisted[case.item][:NUM_UNLISTED]]


RUNNABLE = select_cases()
NAMES = [case.name for case in RUNNABLE]


def expected_verdict(case):
    if case.expected != EITHER:
        return case.expected
    return "refused" if case.run.__name__ in REFUSED.get(case.item, ()) else "exact"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return records by mode and name. Only cases that must be exact need a reference."""
    folder = tmp_path_factory.mktemp("silent")
    exact = [case for case in RUNNABLE if expected_verdict(case) == "exact"]
    return {
        "shared": launch(folder, "shared", RUNNABLE),
        "reference": launch(folder, "reference", exact),
        "alone": launch(folder, "alone", [case for case in RUNNABLE if case.alone]),
    }


def test_every_kind_has_listed_cases_and_two_more():
    for item, kind in KINDS.items():
        listed = [case.listed for case in CASES if case.item == item]
        assert any(listed), kind
        if item <= 8:
            assert listed.count(False) >= 2, kind
    refused_names = {name for names in REFUSED.values() for name in names}
    assert refused_names <= {case.run.__name__ for case in CASES}


@pytest.mark.timeout(900)  # the first waits for the launches
@pytest.mark.parametrize("case", RUNNABLE, ids=NAMES)
def test_numbers_are_exact_or_refused(results, case):
    shared = results["shared"][case.name]
    outcome = classify(shared, results["reference"].get(case.name, shared))
    assert outcome.verdict == expected_verdict(case), f"{case.name} is {outcome.verdict}: {outcome.detail}"
    if case.alone:
        alone = results["alone"][case.name]
        outcome = classify(alone, results["reference"].get(case.name, alone))
        assert outcome.verdict == expected_verdict(case), (
            f"{case.name} in one process is {outcome.verdict}: {outcome.detail}"
        )
