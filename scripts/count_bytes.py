"""Bytes that a rank sends in one forward pass, ring against direct, counted on the wire of real processes.

Three cases of one layer: dense causal, a sliding window, and packed documents of mixed length. Each layout is run by
gloo processes that count the bytes they pass to `torch.distributed`, beside the work of the busiest rank over the
mean. Gradients take the same routes in fp32. Tiny heads keep the compute small; figures are scaled to 8 key/value
heads of 128 in bf16.

    python scripts/count_bytes.py                        # 64K tokens over 8 processes, some minutes on two cores
    python scripts/count_bytes.py --length 8192 --processes 4
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.geometry import LAYOUTS, Mask, ShardedSequence, rank_work
from ring_hf.launcher import WorkerPool
from ring_hf.parallel import context_attention
from ring_hf.parallel.buffers import Buffer
from ring_hf.parallel.transport import RingComm
from ring_hf.text import markdown_table
from scripts.bench_algorithms import mixed_documents
from scripts.bench_harness import initialize_attention, new_store

TOKEN_BYTES = 2 * 8 * 128 * 2  # keys and values of 8 heads of 128 in bf16
TRANSPORTS = ("ring", "direct")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536, help="tokens of the sequence")
    parser.add_argument("--processes", type=int, default=8, help="ranks that share it")
    parser.add_argument("--window", type=int, default=1024, help="tokens that a query sees in the second case")
    parser.add_argument("--documents", type=int, default=200, help="packed documents in the third case")
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> list[tuple[str, str, Mask, tuple[int, ...] | None]]:
    """Return case, layout, mask and document boundaries."""
    documents = mixed_documents(arguments.length, arguments.documents)
    masks = (
        ("dense causal", Mask(), None),
        (f"window {arguments.window:,}", Mask(window=arguments.window), None),
        (f"{len(documents) - 1} documents", Mask(), documents),
    )
    return [(name, layout, mask, bounds) for name, mask, bounds in masks for layout in LAYOUTS]


def count_sent(rank: int, arguments: argparse.Namespace) -> list[float]:
    """Run all cases in a rank and return the mean over ranks of the bytes sent, per case and transport."""
    world = arguments.processes
    q, k, v = (torch.randn(1, 1, arguments.length // world, 8) for _ in range(3))
    original, sent = RingComm.isend_irecv, 0

    def isend_irecv(self: RingComm, send: Buffer | None, *rest: Any, **more: Any) -> Any:
        nonlocal sent
        sent += 0 if send is None else send.flat.numel()
        return original(self, send, *rest, **more)

    mean_bytes = []
    for _, layout, mask, documents in cases(arguments):
        for transport in TRANSPORTS:
            sent = 0
            with mock.patch.object(RingComm, "isend_irecv", isend_irecv):
                context_attention(
                    q, k, v, layout=layout, window=mask.window, cu_seqlens=documents, transport=transport
                )
            total = torch.tensor(float(sent))
            dist.all_reduce(total)
            mean_bytes.append(total.item() / world / (2 * 8) * TOKEN_BYTES)
    return mean_bytes


def count(arguments: argparse.Namespace) -> list[float]:
    processes = arguments.processes
    pool = WorkerPool(processes, initialize_attention, (processes, new_store(), False))
    try:
        return pool.run(count_sent, arguments, timeout=1800)[0]  # type: ignore[no-any-return]
    finally:
        pool.stop(patience=10)


def main() -> None:
    arguments = parse_arguments()
    counts = iter(count(arguments))
    print(f"{arguments.length:,} tokens over {arguments.processes} processes, torch {torch.__version__}\n")
    rows = [["case", "layout", "ring, MiB", "direct, MiB", "direct / ring", "busiest rank / mean"]]
    for name, layout, mask, documents in cases(arguments):
        ring, direct = (next(counts) / 2**20 for _ in TRANSPORTS)
        sequence = ShardedSequence(layout, arguments.length, arguments.processes, documents and (documents,))
        work = [rank_work(sequence, mask, rank) for rank in range(arguments.processes)]
        imbalance = max(work) * arguments.processes / sum(work)
        rows.append([name, layout, f"{ring:.1f}", f"{direct:.1f}", f"{direct / ring:.3f}", f"{imbalance:.3f}"])
    print(markdown_table(rows, align="llr", padded=False))


if __name__ == "__main__":
    main()
