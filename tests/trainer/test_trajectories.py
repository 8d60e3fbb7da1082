"""Training under `accelerate launch` with an unmodified Trainer follows one process that holds whole sequences, step
by step.

Each case trains 20 steps (8 without RING_HF_ALL_CASES) at a learning rate at which one process agrees with itself
under other rounding (checked first). Each world size is launched once and runs all of its cases. A test reads one.
"""

import pytest

from tests.trainer.cases import FP32_AT_THE_RATE_OF_BF16, SELF_AGREEMENT, STEPS, Case, reference_cases, world_cases
from tests.trainer.compare import assert_same_run, compare_runs

CASES = [(world_size, case) for world_size in (2, 4) for case in world_cases(world_size)]
EXACT = [(world_size, case) for world_size, case in CASES if case.broken is None and not case.bf16]
BROKEN = [(world_size, case) for world_size, case in CASES if case.broken is not None]

pytestmark = pytest.mark.timeout(900)  # the first test of a world size waits for its launch


def names(cases):
    return [f"{case.name}" for _, case in cases]


def test_the_cases_cover_what_is_claimed():
    exact = [case for _, case in EXACT]
    assert len(exact) == len({case.name for case in exact}) >= 50 and STEPS in (8, 20)
    for cp, dp in ((2, 1), (4, 1), (2, 2)):
        mesh_cases = [case for case in exact if (case.cp, case.dp) == (cp, dp)]
        for layout in ("contiguous", "zigzag", "striped"):
            assert {case.data for case in mesh_cases if case.layout == layout} >= {"uneven", "hole"}
        assert {case.checkpointing for case in mesh_cases} == {None, "reentrant", "non-reentrant"}
    assert all(case.accumulation == 2 for case in exact)
    for cp in (2, 4):
        cp_cases = [case for case in exact if case.cp == cp]
        assert {"ulysses", "balanced"} <= {case.layout for case in cp_cases}
        assert {case.head_chunks for case in cp_cases} == {1, 2}
        assert {case.transport for case in cp_cases} >= {"ring", "allgather", "direct", "auto"}
    assert {case.data for case in exact} == {"uneven", "hole", "prefix"}
    cp4_cases = [case for case in exact if case.cp == 4]
    assert {case.ulysses for case in cp4_cases} == {None, 2, "auto"}
    assert any(case.transport == "double_ring" and case.inner == 2 for case in cp4_cases)


@pytest.mark.parametrize("world_size", [2, 4])
def test_as_many_processes_as_launched_really_ran(launches, world_size):
    results = launches.results(world_size)
    assert len(set(results["processes"])) == world_size
    assert all(results[case.name]["engine"] == "DistributedType.MULTI_CPU" for case in world_cases(world_size))


def test_every_log_holds_speed_and_memory_of_the_device(launches):
    for case in world_cases(2):
        logged = launches.results(2)[case.name]["logged"]
        assert {"loss", "grad_norm", "tokens_per_second_per_device", "peak_memory_gb"} <= set(logged), case.name


def test_sequences_are_not_counted_by_every_rank_that_shares_them(launches):
    for world_size in (1, 2, 4):
        for case in world_cases(world_size) if world_size > 1 else reference_cases():
            sequences = launches.results(world_size)[case.name]["sequences"]
            assert sequences == pytest.approx(case.batch * case.steps, rel=0.02), case.name


@pytest.mark.parametrize("case", SELF_AGREEMENT, ids=lambda case: case.name)
def test_one_process_agrees_with_itself(launches, case):
    reference = Case("", model=case.model, window=case.window).reference().name
    assert_same_run(case.name, launches.results(1)[case.name], launches.results(1)[reference])


@pytest.mark.parametrize(("world_size", "case"), EXACT, ids=names(EXACT))
def test_training_follows_one_process(launches, world_size, case):
    assert_same_run(case.name, launches.results(world_size)[case.name], launches.results(1)[case.reference().name])


def test_bf16_is_no_further_from_fp32_than_one_process_in_bf16(launches):
    (case,) = (case for _, case in CASES if case.bf16)
    truth = launches.results(1)[FP32_AT_THE_RATE_OF_BF16.name]
    ours, _ = compare_runs(f"{case.name} and one process in fp32", launches.results(2)[case.name], truth)
    theirs, _ = compare_runs("one process in bf16 and in fp32", launches.results(1)[case.reference().name], truth)
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize(("world_size", "case"), BROKEN, ids=names(BROKEN))
def test_a_deliberate_mistake_shows(launches, world_size, case):
    loss, grad_norm = compare_runs(
        case.name, launches.results(world_size)[case.name], launches.results(1)[case.reference().name]
    )
    assert loss > 1e-3 and grad_norm > 1e-3
