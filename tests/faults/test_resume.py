"""Runs that go on from a checkpoint in the middle of an epoch: the same losses, also in other settings."""

import pytest

from tests.faults.resume_report import compare, run
from tests.faults.resume_script import HALF, RESUMES
from tests.trainer.compare import MAX_GRAD_NORM, MAX_LOSS
from tests.trainer.conftest import shared_folder

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(shared_folder(tmp_path_factory, "resumes"))


@pytest.mark.parametrize("resume", RESUMES, ids=lambda resume: resume.name)
def test_resumed_losses_are_those_of_a_whole_run(results, resume):
    difference = compare(results, resume)
    print(f"{resume.name}: {difference}")
    assert difference.loss <= (0 if resume.is_bitwise else MAX_LOSS)
    assert difference.grad_norm <= (0 if resume.is_bitwise else MAX_GRAD_NORM)
    assert difference.weights <= (0 if resume.is_bitwise else 1e-5)


def test_the_best_model_of_a_resumed_run_is_from_before(results):
    assert results["best model"]["best"] == results["best model resumed"]["best"] == f"checkpoint-{HALF}"
    plain, best = results["plain"]["weights"], results["best model"]["weights"]
    assert abs(plain - best) > 1e-6 * plain  # the last weights are others
