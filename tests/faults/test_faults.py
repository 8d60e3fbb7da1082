"""A rank that fails ends all ranks in bounded time, with an error that names it; the same command goes on."""

import os
import re
from functools import cache

import pytest

from tests.faults.injection import FAULTS
from tests.faults.outcomes import ENGINES, TIMEOUT, play
from tests.faults.report import find_problems

# Without a launcher, so that every rank ends by itself: the two kinds of ends, and every case with all of them.
SAMPLE = {("DDP", "killed while saving"), ("DDP", "stalls in collator")}
ALL = bool(os.environ.get("RING_HF_ALL_CASES"))
EVERY = [(engine, name) for engine in ENGINES for name in FAULTS]
CASES = EVERY if ALL else [case for case in EVERY if case in SAMPLE]

pytestmark = pytest.mark.timeout(400)


@cache
def reference(folder, engine):
    outcome = play(folder / f"{engine} none", engine, "none", forked=True, again=False)
    assert outcome.first.codes == [0, 0], outcome.first.output
    return outcome.results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def test_the_sample_is_part_of_the_table():
    assert set(EVERY) >= SAMPLE and len(EVERY) == 57


@pytest.mark.parametrize(("engine", "name"), CASES, ids=lambda value: value)
def test_a_failed_rank_ends_all_and_the_next_start_goes_on(folder, engine, name):
    outcome = play(folder / f"{engine} {name}", engine, name, forked=True)
    print(f"{engine}, {name}: exit codes {outcome.first.codes} after {outcome.first.seconds:.1f} s")
    print("\n".join(outcome.lines_of("ring_hf: ")))
    difference = None
    if ALL and outcome.results is not None:  # otherwise, `test_resume.py` compares the losses of resumed runs
        expected = reference(folder, engine)["loss"]
        difference = max(abs(a - b) for a, b in zip(outcome.results["loss"], expected, strict=True))
    assert find_problems(name, outcome, difference) == [], "\n".join(outcome.first.output)[-8000:]
    fault = FAULTS[name]
    text = outcome.first.output[1 - fault.rank]  # of a rank without a fault
    assert re.search(rf"[Rr]ank {fault.rank}\b", text), text[-4000:]
    if name.startswith("stalls"):
        assert f"made no progress for {TIMEOUT} s" in text
