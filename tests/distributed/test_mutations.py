"""The tests can fail: each deliberate fault in the ring breaks exactness, on the rank that runs it or another.

Every fault is one that some published implementation had: a block used twice, the last gradient hop forgotten, a merge
that goes on with an old lse, per-block instead of global statistics in backward, and so on.
"""

import pytest

import ring_hf.kernels.merge
import ring_hf.parallel.schedule as schedule
from ring_hf.kernels import cpu
from tests.distributed.cases import Case, errors
from tests.harness import run_distributed


def _stale_block(patch):
    original = schedule._Blocks.wait

    def wait(self):
        here = self._here
        original(self)
        if here is not None:
            self._k, self._v = here.first, here.second

    patch.setattr(schedule._Blocks, "wait", wait)


def _gradients_stay_abroad(patch):
    original = schedule._Gradients.home

    def home(self):
        share = self._share
        original(self)
        return share.first, share.second

    patch.setattr(schedule._Gradients, "home", home)


def _drop_arriving_gradients(patch):
    original = schedule._Gradients.add_and_send

    def add_and_send(self, step):
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
        original(self, step)

    patch.setattr(schedule._Gradients, "add_and_send", add_and_send)


def _stale_lse(patch):
    original = ring_hf.kernels.merge.merge_

    def merge_(out, lse, block_out, block_lse):
        original(out, lse.clone(), block_out, block_lse)

    patch.setattr(ring_hf.kernels.merge, "merge_", merge_)


def _sum_of_softmaxes(patch):
    def merge_(out, lse, block_out, block_lse):
        out.add_(block_out)
        lse.copy_(lse.logaddexp(block_lse))

    patch.setattr(ring_hf.kernels.merge, "merge_", merge_)


def _own_statistics_in_backward(patch):
    original = cpu.backward

    def backward(dout, q, k, v, out, lse, tile, scale):
        out, lse = out.clone(), lse.clone()
        for piece, piece_out, piece_lse in cpu.forward(q, k, v, tile, scale):
            if piece.count == 1:
                out[:, :, piece.q : piece.q + piece.num_q] = piece_out
                lse[:, :, piece.q : piece.q + piece.num_q] = piece_lse
        yield from original(dout, q, k, v, out, lse, tile, scale)

    patch.setattr(cpu, "backward", backward)


def _one_hop_short(patch):
    original = schedule._Blocks.__init__

    def init(self, *args):
        original(self, *args)
        self._left = max(0, self._left - 1)

    patch.setattr(schedule._Blocks, "__init__", init)


def _anticausal_not_flipped(patch):
    patch.setattr(
        cpu,
        "_take",
        lambda x, piece, keys, take=cpu._take: (
            take(x, piece, keys).flip(2) if piece.kind == "anticausal" else take(x, piece, keys)
        ),
    )


FAULTS = {
    "stale-block": _stale_block,
    "gradients-stay-abroad": _gradients_stay_abroad,
    "arriving-gradients-dropped": _drop_arriving_gradients,
    "stale-lse": _stale_lse,
    "sum-of-softmaxes": _sum_of_softmaxes,
    "own-statistics-in-backward": _own_statistics_in_backward,
    "one-hop-short": _one_hop_short,
    "window-not-flipped": _anticausal_not_flipped,
}


def errors_with_fault(rank: int, world_size: int, fault: str, case: Case) -> float:
    """The largest relative error of any tensor on this rank while the fault is in place (NaN counts as infinite)."""
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault](patch)
        (row,) = errors(rank, world_size, [case])
    ratios = [ratio for _, ratio, _ in row.values()]
    return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_breaks_exactness(fault):
    case = Case("zigzag", 3, window=30 if fault == "window-not-flipped" else None)
    assert max(run_distributed(3, errors_with_fault, "", case)) < 1e-12
    broken = max(run_distributed(3, errors_with_fault, fault, case))
    print(f"MUTATION {fault}: relative error {broken:.2e}")
    assert broken > 1e-3
