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
            self._block = here.first, here.second

    patch.setattr(schedule._Blocks, "wait", wait)


def _gradients_stay_abroad(patch):
    original = schedule._Gradients.home

    def home(self):
        self._exchange.wait().zero_()
        return original(self)

    patch.setattr(schedule._Gradients, "home", home)


def _last_gradient_hop_goes_to_a_neighbour(patch):
    original = schedule.Ring.post

    def post(self, send, receive, tag, shift=1):
        return original(self, send, receive, tag, 1 if tag == schedule.GRADIENTS else shift)

    # Two hops in a ring of four: home is two ranks back, not one ahead.
    patch.setattr(schedule.Ring, "post", post)


def _arriving_gradients_dropped(patch):
    original = schedule._Gradients.send

    def send(self, hop):
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
        original(self, hop)

    patch.setattr(schedule._Gradients, "send", send)


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


def _anticausal_not_flipped(patch):
    patch.setattr(
        cpu,
        "_take",
        lambda x, piece, keys, take=cpu._take: (
            take(x, piece, keys).flip(2) if piece.kind == "anticausal" else take(x, piece, keys)
        ),
    )


# fault -> (how to break it, the case that shows it)
FAULTS = {
    "stale-block": (_stale_block, Case("zigzag", 3)),
    "last-gradient-hop-dropped": (_gradients_stay_abroad, Case("zigzag", 3)),
    "last-gradient-hop-misdirected": (_last_gradient_hop_goes_to_a_neighbour, Case("contiguous", 4, window=30)),
    "arriving-gradients-dropped": (_arriving_gradients_dropped, Case("zigzag", 3)),
    "stale-lse": (_stale_lse, Case("zigzag", 3)),
    "sum-of-softmaxes": (_sum_of_softmaxes, Case("zigzag", 3)),
    "own-statistics-in-backward": (_own_statistics_in_backward, Case("zigzag", 3)),
    "window-not-flipped": (_anticausal_not_flipped, Case("zigzag", 3, window=30)),
}


def errors_with_fault(rank: int, world_size: int, fault: str, case: Case) -> float:
    """The largest relative error of any tensor on this rank while the fault is in place (NaN counts as infinite)."""
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault][0](patch)
        (row,) = errors(rank, world_size, [case])
    ratios = [ratio for _, ratio, _ in row.values()]
    return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_breaks_exactness(fault):
    case = FAULTS[fault][1]
    assert max(run_distributed(case.num_ranks, errors_with_fault, "", case)) < 1e-12
    broken = max(run_distributed(case.num_ranks, errors_with_fault, fault, case))
    print(f"MUTATION {fault}: relative error {broken:.2e}")
    assert broken > 1e-3
