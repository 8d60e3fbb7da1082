"""The tests can fail: each deliberate fault in the ring breaks exactness, on the rank that runs it or another.

Every fault is one that some published implementation had: a block used twice, the last gradient hop forgotten, a merge
that goes on with an old lse, per-block instead of global statistics in backward, and so on.
"""

import pytest
import torch

import ring_hf.kernels.merge
from ring_hf.geometry import Move, Plan
from ring_hf.kernels import causal_blocks
from ring_hf.parallel import allgather, chunked_ulysses, direct_fetch, ring, sharded_attention, transport
from tests.parallel.cases import Case, errors
from tests.support.harness import run_distributed


def _stale_block(patch):
    original = ring.KVBlocks.finish_step

    def finish_step(self, step):
        before = self._blocks[step].flat.clone() if step in self._blocks else None
        original(self, step)
        if before is not None and step + 1 in self._blocks:
            self._blocks[step + 1].flat.copy_(before)

    patch.setattr(ring.KVBlocks, "finish_step", finish_step)


def _gradients_stay_abroad(patch):
    original = ring.KVGradients.finish

    def finish(self):
        for exchange in self._pending[len(self._plan.steps)]:
            exchange.wait()
            exchange.receive.flat.zero_()
        return original(self)

    patch.setattr(ring.KVGradients, "finish", finish)


def _last_gradient_hop_goes_to_a_neighbour(patch):
    original = transport.RingComm.isend_irecv

    def isend_irecv(self, send, to, receive, source, tag, inter_node=False):
        if tag == transport.GRADIENTS:
            to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return original(self, send, to, receive, source, tag, inter_node)

    # Two hops in a ring of four: home is two ranks back, not one ahead.
    patch.setattr(transport.RingComm, "isend_irecv", isend_irecv)


def _arriving_gradients_dropped(patch):
    original = ring.KVGradients.send

    def send(self, step):
        for exchange in self._pending.pop(step, ()):
            exchange.wait()
        original(self, step)

    patch.setattr(ring.KVGradients, "send", send)


def _outer_block_is_the_last_of_the_turn(patch):
    original = Plan.moves.fget

    def moves(self):
        return tuple(
            Move(min(move.recv_step - 1, move.send_step + 1), move.recv_step, move.outer, move.inner)
            if move.outer
            else move
            for move in original(self)
        )

    patch.setattr(Plan, "moves", property(moves))


def _fetched_gradients_land_at_the_start(patch):
    original = direct_fetch.GradAccumulator.add_tokens
    patch.setattr(direct_fetch.GradAccumulator, "add_tokens", lambda self, start, grad: original(self, 0, grad))


def _gathered_in_rank_order(patch):
    patch.setattr(allgather.KVBlocks, "_slices", lambda self, x: list(x))


def _heads_of_a_neighbour(patch):
    original = sharded_attention.heads_to_seq
    patch.setattr(sharded_attention, "heads_to_seq", lambda x, shares, group: original(x.flip(1), shares, group))


def _keys_of_the_chunk_before(patch):
    original = chunked_ulysses._Heads.fetch_keys

    def fetch_keys(self, chunks, k, v):
        before = self.kv
        original(self, chunks, k, v)
        self.kv = before or self.kv

    patch.setattr(chunked_ulysses._Heads, "fetch_keys", fetch_keys)
    patch.setattr(chunked_ulysses._Heads, "release_keys", lambda self, chunks: None)


def _gradients_of_the_last_chunk_alone(patch):
    def add_gradients(self, chunks, *grads):
        self._grads = list(grads)

    patch.setattr(chunked_ulysses._Heads, "add_gradients", add_gradients)


def _sinks_join_every_step(patch):
    original = ring_hf.kernels.merge.OutLseAccumulator.merge

    def merge(self, queries, out, lse):
        original(self, queries, out, lse)
        self.lse = torch.logaddexp(self.lse, torch.zeros_like(self.lse))

    patch.setattr(ring_hf.kernels.merge.OutLseAccumulator, "merge", merge)


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
    original = causal_blocks.CausalBlockKernel.backward

    def backward(self, dout, q, k, v, out, lse, tiles, scale, softcap):
        out, lse = out.clone(), lse.clone()
        for queries, own_out, own_lse in self.forward(q, k, v, tiles, scale):
            queries.gather(out).copy_(own_out)
            queries.gather(lse).copy_(own_lse)
        yield from original(self, dout, q, k, v, out, lse, tiles, scale)

    patch.setattr(causal_blocks.CausalBlockKernel, "backward", backward)


def _anticausal_not_flipped(patch):
    original = causal_blocks.gather_block

    def gather_block(x, block, tokens):
        gathered = original(x, block, tokens)
        return gathered.flip(2) if block.kind == "anticausal" else gathered

    patch.setattr(causal_blocks, "gather_block", gather_block)


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
    "double-ring-sends-on-a-later-block": (
        _outer_block_is_the_last_of_the_turn,
        Case("zigzag", 4, transport="double_ring", inner=2),
    ),
    "fetched-gradients-misplaced": (
        _fetched_gradients_land_at_the_start,
        Case("contiguous", 3, window=9, transport="direct"),
    ),
    "gathered-in-rank-order": (_gathered_in_rank_order, Case("zigzag", 3, transport="allgather")),
    "heads-out-of-order": (_heads_of_a_neighbour, Case("zigzag", 2, ulysses=2)),
    "keys-of-the-chunk-before": (_keys_of_the_chunk_before, Case("zigzag", 2, ulysses=2, kv_heads=4, head_chunks=2)),
    "gradients-of-the-last-chunk": (
        _gradients_of_the_last_chunk_alone,
        Case("zigzag", 2, ulysses=2, kv_heads=2, head_chunks=2),
    ),
    "sinks-in-every-step": (_sinks_join_every_step, Case("zigzag", 3, with_sinks=True)),
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
