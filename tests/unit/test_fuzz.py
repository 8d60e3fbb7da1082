"""A small run of `scripts/fuzz.py`, the same cases every time; and proof that it, and its threads, can fail."""

import sys
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ring_hf.kernels import merge
from ring_hf.parallel import group_of, ring
from scripts import fuzz
from tests.harness import ROOT, run_command
from tests.threads import threads_as_ranks


def test_random_problems_match_dense_attention_on_every_layout_and_transport():
    seen, worst = set(), []

    def advance(case, apart):
        seen.update(case.kinds)
        worst.append(apart)

    fuzz.fuzz(150, None, advance)
    assert len(worst) >= 150 and max(worst) <= fuzz.BAR
    wanted = [f"layout {name}" for name in fuzz.LAYOUTS] + [f"transport {name}" for name in fuzz.TRANSPORTS]
    wanted += ["transport auto", "full mask", "window", "chunks", "prefix", "packed documents", "padding", "hybrid"]
    wanted += [
        "several rows",
        "grouped heads",
        "other value head dim",
        "softcap",
        "sinks",
        "uneven heads",
        "heads in chunks",
        "no overlap",
    ]
    assert set(wanted) <= seen


def sum_of_softmaxes(out, lse, block_out, block_lse):
    out.add_(block_out)
    torch.logaddexp(lse, block_lse, out=lse)


FAULTS = {
    "softmaxes summed": mock.patch.object(merge, "merge_", sum_of_softmaxes),
    "blocks read before they came": mock.patch.object(ring.PendingExchange, "wait", lambda self, patience=None: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_smallest_case_is_shown(fault, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "200", "--seed", "3"])
    monkeypatch.setattr(fuzz, "poison_empty", lambda: None)  # it is, in tests
    with FAULTS[fault]:
        assert fuzz.main() == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 3\n") and "FAILED after" in said
    assert "Case(sequence=ShardedSequence(layout=" in said and "is off by" in said


def test_the_script_says_what_it_ran():
    done = run_command([sys.executable, "scripts/fuzz.py", "--cases", "12", "--seed", "11"])
    assert done.stdout.startswith("seed 11\n") and "  layout " in done.stdout
    assert "worst difference" in done.stdout and str(ROOT) not in done.stdout


def test_a_rank_that_fails_wakes_the_others_and_its_error_is_the_one_that_shows():
    def one(rank, group):
        if rank == 1:
            raise KeyError("rank 1")
        x = torch.zeros(2)
        dist.all_to_all_single(x, x, [1, 1], [1, 1], group=group_of(group))

    before = threading.active_count()
    with threads_as_ranks() as run, pytest.raises(KeyError, match="rank 1"):
        run(2, one)
    assert threading.active_count() == before
