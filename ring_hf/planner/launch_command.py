"""How a job is run: a file of `configs/accelerate`, options beside it, and the YAML of `recipes/finetune.py`.

Keys are those of `recipes/arguments.py` and of Transformers' `TrainingArguments`; `tests/planner/test_launch.py` has
the recipe's own parser and Accelerate's read what is printed.
"""

from typing import Any

from .engine_bytes import ONE_PROCESS, engine_of
from .training_job import Job

# The file that starts a family of engines, by the number of machines and of devices on each; others take the last one
# of the family with other numbers.
FILES = {
    "ddp": {(1, 2): "ddp_2gpu.yaml", (1, 8): "ddp_8gpu.yaml"},
    "fsdp2": {(4, 8): "hsdp_4x8gpu.yaml", (1, 8): "fsdp2_8gpu.yaml"},
    "zero3": {(1, 8): "zero3_8gpu.yaml"},
}
_ATTENTION = {"none": "none", "full": "recompute", "save-attention": "save"}
_FROM_OTHER_MACHINES = "--machine_rank <0, 1, ...> --main_process_ip <address of machine 0> --main_process_port 29500"


def run_of(job: Job) -> dict[str, Any]:
    """Return what the YAML of `recipes/finetune.py` says, key by key.

    Length, batch, optimizer and memory options are always there; what is automatic is left out.
    """
    replicas = 1 if engine_of(job).family == "fsdp2" else job.dp
    run: dict[str, Any] = {"model": job.model.name, "max_length": job.length, "per_device_train_batch_size": job.rows}
    run["attn_implementation"] = f"ring_{job.layout}"
    run |= {"context_parallel_size": job.cp, "dp_replicate_size": replicas}
    if job.ulysses > 1:
        run["ulysses_size"] = job.ulysses
    if job.inner > 1:
        run["inner_ring_size"] = job.inner
    if job.transport != "auto":
        run["transport"] = job.transport
    if job.kernel != "auto":
        run["kernel"] = job.kernel
    run["memory_attention"] = _ATTENTION[job.checkpoint]
    kept = [name for name in ("layers", "attention") if name in job.offload]
    if kept:
        run["memory_offload"] = "all" if len(kept) == 2 else kept[0]
    run |= {key: size for key, size in (("ffn_block", job.ffn_block), ("loss_block", job.loss_block)) if size}
    if job.fused:  # its fused loss is no part of the plan, and refused on sharded weights
        run |= {"use_liger_kernel": True, "liger_kernel_config": "{fused_linear_cross_entropy: false}"}
    run["optim"] = job.optimizer
    # With bf16: true, Accelerate makes all weights fp32 that FSDP2 trains.
    return run | ({"dtype": "bfloat16", "bf16": False} if job.precision == "bf16" else {"bf16": True})


def gaps_of(job: Job) -> list[str]:
    """Return what the recipe cannot be told of a job, or training refuses of it."""
    gaps = []
    if job.lora:
        gaps.append(f"adapters of rank {job.lora}: the recipe trains all parameters; add them with PEFT in a script")
    if job.fp8:
        gaps.append("linear layers in fp8")
    if job.fused and (job.ffn_block or job.loss_block):
        gaps.append("use_liger_kernel beside ffn_block or loss_block, which training refuses: leave one of them out")
    return gaps


def launch_of(job: Job) -> str:
    """Return the program that starts the recipe: `accelerate launch` with a file and options, or plain Python."""
    engine, num_machines = engine_of(job), -(-job.devices // job.per_node)
    if engine is ONE_PROCESS:
        return "python"
    files = FILES[engine.family]
    sizes = num_machines, -(-job.devices // num_machines)
    several = {key: name for key, name in files.items() if (key[0] > 1) == (num_machines > 1)} or files
    words = ["accelerate launch --config_file configs/accelerate/" + files.get(sizes, [*several.values()][-1])]
    if sizes not in files:
        words.append(f"--num_processes {job.devices}")
        words += [f"--num_machines {num_machines}"] if num_machines > 1 else []
    if num_machines > 1:
        words.append(_FROM_OTHER_MACHINES)
        words += ["--deepspeed_multinode_launcher standard"] if engine.family == "zero3" else []
    if engine.family == "zero3" and job.zero < 3:
        words.append(f"--zero_stage {job.zero}")
    return " ".join(words + [option for name, option in engine.offload if name in job.offload])


def launch_text(job: Job, name: str = "plan.yaml") -> str:
    """Return the YAML of a job and the command that runs it, for copying."""
    values = ((key, str(value).lower() if isinstance(value, bool) else value) for key, value in run_of(job).items())
    lines = [f"to run it, as {name}:", *(f"  {key}: {value}" for key, value in values)]
    lines += [f"  # not in it: {gap}" for gap in gaps_of(job)]
    lines += [
        "and with it",
        f"  {launch_of(job)} \\",
        f"    recipes/finetune.py {name} --data <files> --output_dir <folder>",
    ]
    return "\n".join(lines)
