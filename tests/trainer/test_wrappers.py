"""Two processes equal one with the additions of users around a model and its Trainer: adapters, streams, evaluations
that steer training, copies of the model, skipped positions, penalties on weights, clipping, frozen layers, resuming.

The two processes share every sequence, and one process trains with `sdpa`. Each launch runs all of its cases once.
"""

import math

import pytest

from tests.trainer.compare import MAX_LOSS, assert_same_run, compare_runs
from tests.trainer.wrapper_cases import (
    AVERAGE,
    BF16,
    CASES,
    CONTROLS,
    EVALUATED_FIRST,
    MISTAKES,
    RESUMPTIONS,
    STEPS,
    STOPPED,
    wrapper_cases,
)

EXACT = [(case.name, case) for case in CASES] + list(RESUMPTIONS.items())
CONTROLLED = [case for case in CASES if case.control is not None]

pytestmark = pytest.mark.timeout(900)  # the first test waits for the launches


def names(cases):
    return [case.name for _, case in cases]


def result_of(launches, world_size, name):
    result = launches.results(world_size)[name]
    assert "refused" not in result, f"{name} with {world_size} processes was refused: {result['refused']}"
    return result


def steps_after(run, num_steps):
    return {key: run[key][num_steps:] for key in ("loss", "grad_norm")}


def compare_evaluations(name, run, reference):
    """Print and return the worst absolute difference of the losses of all evaluations."""
    assert run["evaluations"].keys() == reference["evaluations"].keys()
    assert run["final"].keys() == reference["final"].keys()
    pairs = [(run["final"][key], reference["final"][key]) for key in run["final"]]
    for key, losses in run["evaluations"].items():
        pairs += zip(losses, reference["evaluations"][key], strict=True)
    assert pairs, f"{name}: no evaluation"
    worst = max(abs(a - b) for a, b in pairs)
    print(f"{name}: {len(pairs)} evaluations, worst loss {worst:.2e}")
    return worst


def test_the_cases_cover_what_is_claimed():
    assert len(CASES) == 15 and len(RESUMPTIONS) == 2 and len(MISTAKES) == 3
    for world_size in (1, 2):
        case_names = [case.name for case in wrapper_cases(world_size)]
        assert len(case_names) == len(set(case_names))
    assert all(case.steps - case.steps_before >= 20 for _, case in EXACT)
    assert {case.control for case in CONTROLLED} == {case.name for case in CONTROLS}
    assert len(CONTROLLED) == len(CASES) - 3  # STOPPED, AVERAGE and BF16 differ in their evaluations


@pytest.mark.parametrize(("reference", "case"), EXACT, ids=names(EXACT))
def test_training_and_evaluation_follow_one_process(wrapper_launches, reference, case):
    run, whole = result_of(wrapper_launches, 2, case.name), result_of(wrapper_launches, 1, reference)
    assert run["num_trained"] == whole["num_trained"] > 0
    before = case.steps_before
    # A resumed run computes only the steps after its checkpoint.
    assert run["steps"] == whole["steps"] - before == len(whole["loss"]) - before
    assert_same_run(case.name, steps_after(run, before), steps_after(whole, before))
    if case is BF16:  # test_bf16_evaluation_is_as_close_to_fp32_as_one_process compares its final evaluation
        run, whole = ({**results, "final": {}} for results in (run, whole))
    assert compare_evaluations(case.name, run, whole) <= MAX_LOSS


@pytest.mark.parametrize("case", CONTROLLED, ids=lambda case: case.name)
def test_the_feature_changes_training(wrapper_launches, case):
    """Checked in one process, since a wrapper without effect would agree with any run."""
    run, control = (result_of(wrapper_launches, 1, name) for name in (case.name, case.control))
    loss, _ = compare_runs(f"{case.name} and {case.control}", run, control)
    assert loss > 1e-3


def test_early_stopping_ends_at_the_same_step_with_the_same_best_model(wrapper_launches):
    run, whole = (result_of(wrapper_launches, world_size, STOPPED.name) for world_size in (2, 1))
    far = run["evaluations"]["eval_far_loss"]
    best = far.index(min(far))
    assert 10 <= run["steps"] == whole["steps"] < STOPPED.steps
    assert run["best_step"] == whole["best_step"] == 2 * (best + 1) < run["steps"]
    print(f"best at step {run['best_step']}, stopped at {run['steps']}, losses {far}")
    assert abs(run["final"]["eval_far_loss"] - far[best]) <= MAX_LOSS < far[-1] - far[best]
    assert run["final"].keys() == {"eval_near_loss", "eval_far_loss"}


def test_a_copy_of_the_model_is_evaluated_like_that_of_one_process(wrapper_launches):
    run, whole = (result_of(wrapper_launches, world_size, AVERAGE.name) for world_size in (2, 1))
    assert run["average"].keys() == whole["average"].keys() and len(run["average"]) == 3
    for key, losses in run["average"].items():
        worst = max(abs(a - b) for a, b in zip(losses, whole["average"][key], strict=True))
        print(f"{key}: {len(losses)} evaluations, worst loss {worst:.2e}")
        assert worst <= MAX_LOSS
    assert len(run["average"]["on batches of the loader"]) == STEPS / 10 + 1  # while training, and after it
    (average,) = run["average"]["by a Trainer of its own"]
    assert abs(average - run["final"]["eval_loss"]) > 1e-3  # the copy is not the model


def test_bf16_evaluation_is_as_close_to_fp32_as_one_process(wrapper_launches):
    """The evaluation after training casts the model; the last one in training, with the same weights, was in fp32."""

    def rms_from_fp32(run):
        errors = [run["final"][key] - losses[-1] for key, losses in run["evaluations"].items()]
        assert len(errors) == 6
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    ours, theirs = (rms_from_fp32(result_of(wrapper_launches, world_size, BF16.name)) for world_size in (2, 1))
    print(f"RMS of the errors of 6 evaluation losses in bf16: two processes {ours:.2e}, one {theirs:.2e}")
    assert MAX_LOSS < ours <= 2 * theirs


@pytest.mark.parametrize(("reference", "case"), MISTAKES.items(), ids=names(MISTAKES.items()))
def test_a_deliberate_mistake_shows(wrapper_launches, reference, case):
    run, whole = result_of(wrapper_launches, 2, case.name), result_of(wrapper_launches, 1, reference)
    before = case.steps_before
    loss, grad_norm = compare_runs(case.name, steps_after(run, before), steps_after(whole, before))
    assert loss > 1e-3 and grad_norm > 1e-3
    assert compare_evaluations(case.name, run, whole) > 1e-4


def test_training_after_an_evaluation_follows_one_process(wrapper_launches):
    run = result_of(wrapper_launches, 2, EVALUATED_FIRST.name)
    whole = result_of(wrapper_launches, 1, "plain")
    assert_same_run(EVALUATED_FIRST.name, run, whole)


def test_evaluation_after_another_trainer_equals_one_process(wrapper_launches):
    run, whole = (result_of(wrapper_launches, world_size, AVERAGE.name) for world_size in (2, 1))
    assert run["final again"]["eval_loss"] == pytest.approx(whole["final again"]["eval_loss"], abs=MAX_LOSS)
