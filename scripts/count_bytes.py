"""Bytes that a rank sends in one forward pass, ring against direct, counted on the wire of real processes.

Three cases of one layer: dense causal, a sliding window, and packed documents of mixed length. Each layout is run by
gloo processes that count what they hand to `torch.distributed`; beside it the most that a rank works over the mean.
Gradients travel the same ways in fp32. Tiny heads keep the compute small; figures are scaled to 8 key/value heads of
128 in bf16.

    python scripts/count_bytes.py                        # 64K tokens over 8 processes, some minutes on two cores
    python scripts/count_bytes.py --length 8192 --processes 4
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.geometry import LAYOUTS, Mask, ShardedSequence, rank_work
from ring_hf.parallel import context_attention
from ring_hf.parallel.buffers import Buffer
from ring_hf.parallel.transport import Ring
from ring_hf.text import markdown_table
from scripts.bench_algorithms import mixed_documents

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
    """`(case, layout, mask, document boundaries)`."""
    documents = mixed_documents(arguments.length, arguments.documents)
    masks = (
        ("dense causal", Mask(), None),
        (f"window {arguments.window:,}", Mask(window=arguments.window), None),
        (f"{len(documents) - 1} documents", Mask(), documents),
    )
    return [(name, layout, mask, bounds) for name, mask, bounds in masks for layout in LAYOUTS]


def worker(rank: int, store: str, arguments: argparse.Namespace, results: Any) -> None:
    """Runs all cases and reports the mean over ranks of the bytes sent, per case and transport."""
    torch.set_num_threads(1)
    world = arguments.processes
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    q, k, v = (torch.randn(1, 1, arguments.length // world, 8) for _ in range(3))
    original, sent = Ring.post, 0

    def post(self: Ring, send: Buffer | None, *rest: Any, **more: Any) -> Any:
        nonlocal sent
        sent += 0 if send is None else send.flat.numel()
        return original(self, send, *rest, **more)

    found = []
    for _, layout, mask, documents in cases(arguments):
        for transport in TRANSPORTS:
            sent = 0
            with mock.patch.object(Ring, "post", post):
                setting = {"layout": layout, "window": mask.window, "cu_seqlens": documents, "transport": transport}
                context_attention(q, k, v, **setting)
            total = torch.tensor(float(sent))
            dist.all_reduce(total)
            found.append(total.item() / world / (2 * 8) * TOKEN_BYTES)
    if rank == 0:
        results.put(found)


def count(arguments: argparse.Namespace) -> list[float]:
    context = multiprocessing.get_context("spawn")
    results, store = context.Queue(), str(Path(tempfile.mkdtemp()) / "store")
    ranks = range(arguments.processes)
    processes = [context.Process(target=worker, args=(rank, store, arguments, results)) for rank in ranks]
    for process in processes:
        process.start()
    found = results.get(timeout=1800)
    for process in processes:
        process.join()
    return found


def main() -> None:
    arguments = parse_arguments()
    found = iter(count(arguments))
    print(f"{arguments.length:,} tokens over {arguments.processes} processes, torch {torch.__version__}\n")
    rows = [["case", "layout", "ring, MiB", "direct, MiB", "direct / ring", "busiest rank / mean"]]
    for name, layout, mask, documents in cases(arguments):
        ring, direct = (next(found) / 2**20 for _ in TRANSPORTS)
        sequence = ShardedSequence(layout, arguments.length, arguments.processes, documents and (documents,))
        work = [rank_work(sequence, mask, rank) for rank in range(arguments.processes)]
        imbalance = max(work) * arguments.processes / sum(work)
        rows.append([name, layout, f"{ring:.1f}", f"{direct:.1f}", f"{direct / ring:.3f}", f"{imbalance:.3f}"])
    print(markdown_table(rows, align="llr", padded=False))


if __name__ == "__main__":
    main()
