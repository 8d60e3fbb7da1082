"""Every transport, side by side in one run: time and peak memory, forward + backward, causal, dense and packed.

Dense: ratios to the zigzag ring. Packed documents of mixed length: ratios to one process, with as many threads, that
runs each document alone, without padding, mask or exchange. `auto` is the default; it must not be slower than the
ring.

    python scripts/bench_algorithms.py                              # 16K tokens, 2 and 4 processes, about 20 minutes
    python scripts/bench_algorithms.py --processes 2 --lengths 4096 --repeats 3
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.geometry import Mask, ShardedSequence, rank_work
from scripts.bench_harness import Variants, add_options, measure, report, table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="ranks that share a sequence")
    add_options(parser, [16384], ["float32", "bfloat16"], repeats=7)
    parser.add_argument("--documents", type=int, default=50, help="packed documents of mixed length per sequence")
    return parser.parse_args()


def ring(**settings: Any) -> dict[str, Any]:
    return {"baseline": "ring", "settings": settings}


def dense_variants(processes: int) -> Variants:
    variants = {
        "ring": ring(layout="zigzag", transport="ring"),
        "auto": ring(layout="zigzag", transport="auto"),
        "ring, no overlap": ring(layout="zigzag", transport="ring", overlap=False),
        "allgather": ring(layout="zigzag", transport="allgather"),
        "direct": ring(layout="zigzag", transport="direct"),
        "ulysses": ring(layout="zigzag", ulysses_size=processes),
    }
    if processes == 4:
        variants["double_ring 2x2"] = ring(layout="zigzag", transport="double_ring", inner_ring_size=2)
        variants["ulysses 2 x ring 2"] = ring(layout="zigzag", ulysses_size=2, transport="ring")
    return variants


def packed_variants() -> Variants:
    variants: Variants = {"each document alone, 1 process": {"baseline": "sdpa"}}
    for layout in ("zigzag", "balanced"):
        for transport in ("ring", "direct", "allgather", "auto"):
            variants[f"{layout}, {transport}"] = ring(layout=layout, transport=transport)
    return variants


def mixed_documents(length: int, count: int) -> tuple[int, ...]:
    """Return boundaries of documents whose lengths are log-normal: many short ones and a few long ones."""
    generator = random.Random(0)
    sizes = [generator.lognormvariate(0.0, 1.2) for _ in range(count)]
    bounds = {0, length}
    filled = 0.0
    for size in sizes:
        filled += size
        bounds.add(round(filled / sum(sizes) * length))
    return tuple(sorted(bounds))


def imbalance(layout: str, length: int, processes: int, documents: tuple[int, ...]) -> float:
    sequence = ShardedSequence(layout, length, processes, (documents,))
    work = [rank_work(sequence, Mask(), rank) for rank in range(processes)]
    return max(work) * processes / sum(work)


def main() -> None:
    arguments = parse_arguments()
    parts, rows = [], []
    for processes in arguments.processes:
        options = argparse.Namespace(**{**vars(arguments), "processes": processes})
        dense = measure(options, dense_variants(processes))
        parts.append(f"{processes} processes, one document\n\n{table(dense)}\n")
        rows += [{**row, "processes": processes, "packed": False} for row in dense]
        for length in arguments.lengths:
            documents = mixed_documents(length, arguments.documents)
            each = {layout: imbalance(layout, length, processes, documents) for layout in ("zigzag", "balanced")}
            ratios = ", ".join(f"{layout} {figure:.3f}" for layout, figure in each.items())
            only = argparse.Namespace(**{**vars(options), "lengths": [length]})
            packed = measure(only, packed_variants(), documents)
            head = f"{processes} processes, {len(documents) - 1} documents; busiest rank over mean: {ratios}"
            parts.append(f"{head}\n\n{table(packed)}\n")
            rows += [{**row, "processes": processes, "packed": True} for row in packed]
    report(arguments.output, "algorithms", "\n".join(parts), rows)


if __name__ == "__main__":
    main()
