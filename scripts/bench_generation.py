"""Generation over a sharded cache: bytes of keys and values on each rank, messages and time of a decoded token.

One process with two threads beside two processes with one thread each that share the cache of a small Llama; both run
`model.generate` on the same prompt, interleaved. Bytes are those of the cache, after the prompt and at the end; calls
of torch.distributed between two decoded tokens are counted; the time of a token is the median of all.

    python scripts/bench_generation.py --output results/       # prompts of 4K and 32K tokens, 200 new ones
    python scripts/bench_generation.py --lengths 512 --new-tokens 20 --hidden 64 --layers 2
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from tqdm import tqdm

from ring_hf.launcher import WorkerPool, free_port
from ring_hf.text import markdown_table
from scripts.bench_harness import Job, report
from scripts.bench_training import initialize_trainer, model_config, sequences

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "barrier")
COLLECTIVES += ("broadcast", "reduce", "reduce_scatter_tensor", "all_gather_object", "broadcast_object_list")
COLLECTIVES += ("batch_isend_irecv", "isend", "irecv", "send", "recv")
TIMEOUT = 1800.0  # seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768], help="tokens of the prompts")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2, help="ranks that share the cache, one thread each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each variant")
    parser.add_argument("--output", type=Path, help="folder for generation.json and generation.md")
    return parser.parse_args()


class TokenClock:
    """A streamer of `generate` that records when tokens arrive, the bytes of the cache, and calls between tokens.

    Attributes:
        times: of the prompt and of every new token, in seconds.
        bytes_after_prompt: of the keys and values of this process.
        calls: of torch.distributed, between two tokens in the middle of decoding.
    """

    def __init__(self, cache: Any, num_tokens: int) -> None:
        self.times: list[float] = []
        self.bytes_after_prompt = 0
        self.calls: Counter[str] = Counter()
        self._cache, self._middle = cache, max(2, num_tokens // 2)
        self._originals: dict[str, Any] = {}

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        num_tokens = len(self.times) - 1  # the prompt comes first
        if num_tokens == 1:
            self.bytes_after_prompt = bytes_of(self._cache)
        if num_tokens == self._middle:
            self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
            for name, function in self._originals.items():
                setattr(dist, name, self._counted(name, function))
        elif num_tokens == self._middle + 1:
            for name, function in self._originals.items():
                setattr(dist, name, function)

    def end(self) -> None:
        pass

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call


def bytes_of(cache: Any) -> int:
    """Return the bytes of the keys and values that this process keeps."""
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in tensors)


def generate(rank: int, job: Job) -> dict[str, Any]:
    """Generate greedily and return tokens, seconds and bytes of this process."""
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM, set_seed

    import ring_hf

    if rank < job["processes"]:
        config = ring_hf.ContextParallelConfig(context_parallel_size=job["processes"])
        Accelerator(parallelism_config=config, cpu=True)
    set_seed(0)
    total = {**job, "length": job["length"] + job["new_tokens"]}
    model = LlamaForCausalLM(model_config(total, "ring_zigzag" if rank < job["processes"] else "sdpa")).eval()
    prompt = torch.tensor(sequences(job))
    cache = ring_hf.ContextParallelCache(model)  # in one process, the usual one of Transformers
    clock = TokenClock(cache, job["new_tokens"])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else a token 0 would be taken for padding
        past_key_values=cache,
        streamer=clock,
        max_new_tokens=job["new_tokens"],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return {
        "tokens": output[0, job["length"] :].tolist(),
        "prompt_seconds": clock.times[1] - clock.times[0],
        "token_seconds": statistics.median(steps),
        "bytes_after_prompt": clock.bytes_after_prompt,
        "bytes_at_end": bytes_of(cache),
        "calls": dict(clock.calls),
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per length."""
    pool = WorkerPool(
        arguments.processes + 1, initialize_trainer, (arguments.processes, str(free_port()), False)
    )  # the last process is the single one
    shared, alone = list(range(arguments.processes)), [arguments.processes]
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    rows = []
    progress = tqdm(total=len(arguments.lengths) * (arguments.repeats + 1), desc="generation", disable=None)
    for length in arguments.lengths:
        job = {**options, "length": length, "steps": 1}
        warm_up = {**job, "length": 256, "new_tokens": 4}
        for ranks in (shared, alone):
            pool.run(generate, warm_up, ranks=ranks, timeout=TIMEOUT)  # code and buffers of a first run
        progress.update()
        runs = []
        for _ in range(arguments.repeats):
            of_ranks = pool.run(generate, job, ranks=shared, timeout=TIMEOUT)
            runs.append((of_ranks, pool.run(generate, job, ranks=alone, timeout=TIMEOUT)[0]))
            progress.update()
        rows.append({"length": length, **summarize(runs)})
    progress.close()
    pool.stop(patience=10)
    return rows


def summarize(runs: list[tuple[list[dict[str, Any]], dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of one length from pairs of runs: of all ranks, and of the single process."""
    of_ranks, alone = runs[0]
    row: dict[str, Any] = {}
    for key in ("bytes_after_prompt", "bytes_at_end"):
        row[key] = [result[key] for result in of_ranks]
        row[f"{key}_alone"] = alone[key]
    row["calls"] = of_ranks[0]["calls"]
    for key in ("prompt_seconds", "token_seconds"):
        slowest = [max(result[key] for result in ranks) for ranks, _ in runs]
        row[key] = statistics.median(slowest)
        row[f"{key}_alone"] = statistics.median(single[key] for _, single in runs)
        # Run by run, so that both sides of a ratio saw the same machine.
        row[f"{key}_ratio"] = statistics.median(a / single[key] for a, (_, single) in zip(slowest, runs, strict=True))
    pairs = zip(of_ranks[0]["tokens"], alone["tokens"], strict=True)
    row["num_tokens"] = len(alone["tokens"])
    row["equal_tokens"] = next((n for n, (a, b) in enumerate(pairs) if a != b), row["num_tokens"])
    row["ranks_agree"] = all(result["tokens"] == of_ranks[0]["tokens"] for result in of_ranks)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    cells = [
        ["tokens of the prompt", "KV bytes of the largest rank", "alone", "share", "at the end", "alone", "share"]
        + ["calls per token", "token ms", "alone", "ratio", "prompt s", "alone", "ratio", "equal tokens"]
    ]
    for row in rows:
        line = [f"{row['length']:,}"]
        for key in ("bytes_after_prompt", "bytes_at_end"):
            largest, alone = max(row[key]), row[f"{key}_alone"]
            line += [f"{largest:,}", f"{alone:,}", f"{largest / alone:.3f}"]
        line.append(", ".join(f"{count} {name}" for name, count in sorted(row["calls"].items())))
        for key, scale in (("token_seconds", 1e3), ("prompt_seconds", 1)):
            line += [f"{scale * row[key]:.2f}", f"{scale * row[f'{key}_alone']:.2f}", f"{row[f'{key}_ratio']:.2f}"]
        cells.append([*line, f"{row['equal_tokens']} of {row['num_tokens']}"])
    return markdown_table(cells, align="r", padded=False)


def main() -> None:
    arguments = parse_arguments()
    rows = measure(arguments)
    sizes = (
        f"{arguments.processes} processes, {arguments.layers} layers, hidden {arguments.hidden}, fp32, "
        f"{arguments.new_tokens} new tokens, greedy"
    )
    report(arguments.output, "generation", f"{sizes}\n\n{table(rows)}\n", rows)
    if not all(row["ranks_agree"] for row in rows):
        raise SystemExit("The ranks returned different tokens.")


if __name__ == "__main__":
    main()
