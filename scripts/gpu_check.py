"""`ring-hf verify` from a checkout that is not installed: exactness, training, speed and memory on a GPU.

    python scripts/gpu_check.py                          # minutes on one GPU; writes runs/gpu_check/...
    python scripts/gpu_check.py --quick
    python scripts/gpu_check.py --only exactness         # or several: exactness,benchmark
    python scripts/gpu_check.py --only exactness --kernels kernels-community/flash-attn3   # loaded from the hub
    python scripts/gpu_check.py --emulate --quick        # on a CPU, at sizes that say nothing of speed

Four sections, each of which is kept when it is done, so that a run that was stopped continues where it was; of the
last one also each run:

    exactness   every attention kernel that fits, on the tiles of all ranks, forward and backward, against fp64
    trainer     losses and grad norms of a ring, emulated on one device and run on several, against one process
    benchmark   attention TFLOP/s of rings (all blocks resident) against one device with the whole sequence
    steps       tokens/s, MFU and memory of the Trainer's steps, and of one rank's share, against the planner

Writes results.json and results.md, by default to a folder of the device and the day in runs/gpu_check, which git
ignores; it is named first and last. The exit code is 1 if anything is not exact, 2 if there is nothing to run on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.verify import verify_command

RESULTS = Path(__file__).resolve().parents[1] / "runs" / "gpu_check"  # git ignores runs/


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verify_command.add_options(parser, RESULTS)
    options = parser.parse_args(arguments)
    try:
        return verify_command.verify(options, " ".join(["python scripts/gpu_check.py", *arguments]))
    except ValueError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
