"""A small run of the random cases of `scripts/fuzz.py`, always the same, and proof that they can fail."""

import sys
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ring_hf.kernels import merge
from ring_hf.parallel import group_of, ring
from ring_hf.verify import random_cases
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.support.harness import ROOT, load_script, run_command


def test_random_problems_match_dense_attention():
    kinds, differences = set(), []

    def advance(case, difference):
        kinds.update(case.kinds)
        differences.append(difference)

    random_cases.fuzz(150, None, advance)
    assert len(differences) >= 150 and max(differences) <= random_cases.BAR
    expected = {f"layout {name}" for name in random_cases.LAYOUTS}
    expected |= {f"transport {name}" for name in (*random_cases.TRANSPORTS, "auto")}
    expected |= {"full mask", "window", "chunks", "prefix", "packed documents", "padding", "hybrid", "several rows"}
    expected |= {"grouped heads", "other value head dim", "softcap", "sinks", "uneven heads", "heads in chunks"}
    assert expected | {"no overlap"} <= kinds


def sum_of_softmaxes(out, lse, block_out, block_lse):
    out.add_(block_out)
    torch.logaddexp(lse, block_lse, out=lse)


FAULTS = {
    "softmaxes summed": mock.patch.object(merge, "merge_", sum_of_softmaxes),
    "blocks read before they came": mock.patch.object(ring.PendingExchange, "wait", lambda self, patience=None: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_detected_and_the_smallest_case_is_shown(fault, monkeypatch, capsys):
    fuzz = load_script("fuzz")
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "200", "--seed", "3"])
    monkeypatch.setattr(fuzz, "poison_empty", lambda: None)  # the harness has called it
    with FAULTS[fault]:
        assert fuzz.main() == 1
    output = capsys.readouterr().out
    assert output.startswith("seed 3\n") and "FAILED after" in output
    assert "Case(sequence=ShardedSequence(layout=" in output and "is off by" in output


def test_the_script_prints_its_cases():
    done = run_command([sys.executable, "scripts/fuzz.py", "--cases", "12", "--seed", "11"])
    assert done.stdout.startswith("seed 11\n") and "  layout " in done.stdout
    assert "worst difference" in done.stdout and str(ROOT) not in done.stdout


def test_a_failing_rank_wakes_the_others_and_its_error_is_raised():
    def run_rank(rank, group):
        if rank == 1:
            raise KeyError("rank 1")
        x = torch.zeros(2)
        dist.all_to_all_single(x, x, [1, 1], [1, 1], group=group_of(group))

    before = threading.active_count()
    with threads_as_ranks() as run, pytest.raises(KeyError, match="rank 1"):
        run(2, run_rank)
    assert threading.active_count() == before
