"""Peak memory of a rank under each engine, compared with DDP: `python -m tests.engines.memory FOLDER`.

One launch for each engine and set of memory options, with a model whose states are far larger than the rest of the
process. The table compares the peak of the first rank, minus its memory before the model was built.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from ring_hf import memory
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig
from ring_hf.text import markdown_table
from tests.engines.cases import engine_arguments, family_of, state_of
from tests.engines.conftest import ENVIRONMENTS
from tests.support.harness import accelerate_launch
from tests.trainer.cases import Case
from tests.trainer.train_script import arguments, curves

LENGTH, STEPS = 512, 3  # few tokens, so that weights and their states dominate, as in a real run
HIDDEN = 768
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "saved attention, blocks": {"attention": "save", "ffn_block": 64, "loss_block": 64},
}
# glibc keeps freed tensors below a threshold that grows to 32 MB: the peak of FSDP2 then is nearly that of DDP.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


def measure(engine: str, options: str, folder: Path) -> dict[str, Any]:
    """Return the peak bytes and the seconds per step of a few steps in this process."""
    torch.set_num_threads(1)
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
    with engine_arguments(engine) as more:
        before = _peak_bytes()
        torch.manual_seed(0)
        shape = {"hidden_size": HIDDEN, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16384}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": LENGTH}
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="ring_zigzag"))
        if OPTIONS[options]:
            memory.apply(model, **OPTIONS[options])
        run = Case(f"{engine} {options}", "zigzag", world_size, steps=STEPS, batch=1, accumulation=1)
        if "deepspeed" in more:  # its default buffers hold 5e8 elements; a file with "auto" gets these sizes
            zero = more["deepspeed"]["zero_optimization"]
            zero |= {"reduce_bucket_size": HIDDEN**2, "stage3_prefetch_bucket_size": int(0.9 * HIDDEN**2)}
        args = arguments(replace(run, name=run.name), folder, **more)
        args.parallelism_config = ContextParallelConfig(context_parallel_size=world_size)
        rows = [{"input_ids": torch.randint(16384, (LENGTH,)).tolist()} for _ in range(run.batch * STEPS)]
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        trainer = Trainer(model, args, train_dataset=rows, data_collator=ContextParallelCollator(model))
        start_time = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start_time) / STEPS
        peak = _peak_bytes() - before
        parameters = sum(p.numel() for p in LlamaForCausalLM(model.config).parameters())
        return {"peak": peak, "seconds": seconds, "num_parameters": parameters, **curves(trainer), **state_of(trainer)}


def _peak_bytes() -> int:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Launch every engine and print the table. In a launched process, write its measurement."""
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        engine, options = sys.argv[2:4]
        result = measure(engine, options, folder)
        if torch.distributed.get_rank() == 0:
            (folder / f"{engine} {options}.json").write_text(json.dumps(result))
        return
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for options in OPTIONS:
        for engine in ENGINES:
            path = folder / f"{engine} {options}.json"
            if not path.exists():
                command = ["-m", "tests.engines.memory", str(folder), engine, options]
                accelerate_launch(command, 2, ENVIRONMENTS[family_of(engine)] | FREED_AT_ONCE, timeout=900)
            results[engine, options] = json.loads(path.read_text())
    rows = [["engine", "memory options", "MB of a rank", "of DDP", "worst loss difference"]]
    for (engine, options), result in results.items():
        ddp, plain = results["DDP", options], results["DDP", "none"]
        worst = max(abs(a - b) for a, b in zip(result["loss"], plain["loss"], strict=True))
        share = f"{result['peak'] / ddp['peak']:.2f}"
        rows.append([engine, options, f"{result['peak'] / 1e6:,.0f}", share, f"{worst:.1e}"])
    parameters = statistics.median(result["num_parameters"] for result in results.values())
    print(f"{parameters / 1e6:.0f}M parameters, 2 processes, {LENGTH:,} tokens, {STEPS} steps\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
