"""This package beside its alternatives on CPU processes: exactness, time and memory, same shapes, one run.

Two one-thread processes share the sequence. `ring-attention-pytorch` and `axolotl-ringmaster` come from PyPI, without
their dependencies on PyTorch, into a folder of their own (`--packages`), and run as they document it; PyTorch's own
ring needs nothing. Each is first compared with the textbook form in fp64 on a short sequence: a wrong result is not
worth timing, and the report says so.

    python scripts/bench_peers.py                           # 8K tokens, fp32; about 10 minutes
    python scripts/bench_peers.py --dtypes bfloat16 --lengths 16384 --only ring torch-ring --repeats 7
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.text import markdown_table
from scripts.baselines import BASELINES
from scripts.bench_harness import ComparisonPool, Variants, add_options, check_once, measure, report, runs_alone, table

# Imports of the two packages besides PyTorch.
_DEPENDENCIES = ("einops>=0.8", "beartype", "jaxtyping", "wadler-lindig")
VARIANTS: Variants = {
    "ring": {"baseline": "ring", "settings": {"layout": "zigzag", "transport": "ring"}},
    "torch-ring": {"baseline": "torch-ring"},
    "ring-attention-pytorch": {"baseline": "ring-attention-pytorch", "settings": {}},
    "ring-attention-pytorch, striped": {
        "baseline": "ring-attention-pytorch",
        "settings": {"striped_ring_attn": True},
    },
    "axolotl-ringmaster": {"baseline": "axolotl-ringmaster"},
    "sdpa, 1 process": {"baseline": "sdpa"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [8192], ["float32"])
    parser.add_argument("--processes", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="which to run")
    parser.add_argument("--packages", type=Path, default=Path("build/peers"), help="folder to install PyPI's into")
    return parser.parse_args()


def install(packages: list[str], folder: Path) -> None:
    """Install packages from PyPI without their dependencies, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(folder.resolve()))
    missing = [name for name in packages if not list(folder.glob(f"{name.split('==')[0].replace('-', '_')}-*"))]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *missing, *_DEPENDENCIES], check=True)


def check(arguments: argparse.Namespace, variants: Variants) -> list[dict[str, Any]]:
    """Return the relative RMS of every variant at 512 tokens in fp32, dense heads and shared key/value heads."""
    pool, rows = ComparisonPool(arguments.processes, check_once), []
    for name, variant in variants.items():
        for kv_heads in sorted({arguments.heads, arguments.kv_heads}):
            job = {**vars(arguments), **variant, "length": 512, "dtype": "float32"}
            rows.append(
                {"variant": name, "kv_heads": kv_heads, **pool.run({**job, "kv_heads": kv_heads}, runs_alone(job))}
            )
    pool.stop()
    return rows


def check_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per row."""
    names = ("out", "dq", "dk", "dv")
    cells = [["variant", "key/value heads", *names]]
    cells += [[row["variant"], str(row["kv_heads"]), *(f"{row[name]:.1e}" for name in names)] for row in rows]
    return markdown_table(cells, padded=False)


def main() -> None:
    arguments = parse_arguments()
    variants = {name: VARIANTS[name] for name in arguments.only}
    install([p for v in variants.values() if (p := BASELINES[v["baseline"]].package)], arguments.packages)
    errors = check(arguments, variants)
    rows = measure(arguments, variants)
    title = "Relative RMS against fp64, 512 tokens, fp32, largest over the processes:"
    text = f"{title}\n\n{check_table(errors)}\n\nRatios are to {arguments.only[0]}:\n\n{table(rows)}\n"
    report(arguments.output, "peers", text, {"errors": errors, "times": rows})


if __name__ == "__main__":
    main()
