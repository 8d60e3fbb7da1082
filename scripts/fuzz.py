"""Thousands of random attention problems against dense attention in fp64, all in one process.

Each case draws a layout, a mask (causal or full, window, prefix, chunks), documents, padding, batch rows, ranks, a
split into ring and Ulysses, a transport, an inner ring, heads, softcap, sinks, a kernel, overlap on or off. The real
plans, kernels, merges, exchanges and gradients run, every rank as a thread (`ring_hf.verify.random_cases`). Output,
lse and all gradients must agree to 1e-10 with dense attention under a mask written from its definition. Prints the
seed, the cases by kind and the worst difference; exits with 1 and the smallest failing case that Hypothesis finds.

    python scripts/fuzz.py                      # 10,000 cases, 5 to 10 minutes on one core
    python scripts/fuzz.py --cases 500 --seed 7
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.testing import poison_empty
from ring_hf.verify.random_cases import BAR, Case, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, help="repeat the cases of an earlier run")
    arguments = parser.parse_args()
    start = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {start}", flush=True)
    torch.set_num_threads(1)
    poison_empty()
    counts: Counter[str] = Counter()
    worst, start_time = 0.0, time.perf_counter()
    progress = tqdm(total=arguments.cases, desc="cases", disable=None)

    def advance(case: Case, difference: float) -> None:
        nonlocal worst
        counts.update(["all", *case.kinds])
        worst = max(worst, difference)
        progress.update()

    try:
        fuzz(arguments.cases, start, advance)
    except Exception as error:
        progress.close()
        print(f"FAILED after {counts['all']} cases: {type(error).__name__}: {error}")
        print("\n".join(getattr(error, "__notes__", [])))
        return 1
    progress.close()
    for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count:7,}  {kind}")
    seconds = time.perf_counter() - start_time
    print(f"{counts['all']:,} cases in {seconds:.0f} s, worst difference {worst:.2e} (bar {BAR:.0e}), seed {start}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
