"""Ring attention against one process with the same cores: time and peak memory, forward + backward, causal.

Two one-thread processes that share the sequence against one two-thread process running
`scaled_dot_product_attention` on all of it, interleaved; medians and ratios (`scripts/bench_harness.py`).

    python scripts/bench_attention.py                       # 4K, 8K, 16K tokens, fp32 and bf16, a few minutes
    python scripts/bench_attention.py --lengths 16384 --layouts zigzag contiguous --dtypes bfloat16 --repeats 7
    python scripts/bench_attention.py --output results/     # also writes attention.json and attention.md there
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench_harness import Variants, add_options, measure, report, table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [4096, 8192, 16384], ["float32", "bfloat16"])
    parser.add_argument("--layouts", nargs="+", default=["zigzag", "contiguous"], help="ring layouts")
    parser.add_argument("--processes", type=int, default=2, help="ring size; the single process gets as many threads")
    parser.add_argument(
        "--no-overlap", action="store_true", help="also time the ring with exchange and compute in turn"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    variants: Variants = {"sdpa, 1 process": {"baseline": "sdpa"}}
    for overlap in (True, False) if arguments.no_overlap else (True,):
        for layout in arguments.layouts:
            settings = {"layout": layout, "transport": "ring", "overlap": overlap}
            variants[layout if overlap else f"{layout}, no overlap"] = {"baseline": "ring", "settings": settings}
    rows = measure(arguments, variants)
    report(arguments.output, "attention", f"{table(rows)}\n", rows)


if __name__ == "__main__":
    main()
