"""How to run a job: a file of `configs/accelerate` with options, and the YAML of `recipes/finetune.py`.

The keys are those of `recipes/arguments.py` and of Transformers' `TrainingArguments`. `tests/planner/test_launch.py`
reads the printed text with the recipe's own parser and with Accelerate's.
"""

from typing import Any

from .engine_bytes import ONE_PROCESS, select_engine
from .training_job import TrainingJob

# The file that starts a family of engines, by the number of machines and of devices on each. Other sizes take the last
# file of the family and override its numbers.
FILES = {
    "ddp": {(1, 2): "ddp_2gpu.yaml", (1, 8): "ddp_8gpu.yaml"},
    "fsdp2": {(4, 8): "hsdp_4x8gpu.yaml", (1, 8): "fsdp2_8gpu.yaml"},
    "zero3": {(1, 8): "zero3_8gpu.yaml"},
}
_MEMORY_ATTENTION = {"none": "none", "full": "recompute", "save-attention": "save"}
_MULTI_NODE_OPTIONS = "--machine_rank <0, 1, ...> --main_process_ip <address of machine 0> --main_process_port 29500"


def make_recipe_config(job: TrainingJob) -> dict[str, Any]:
    """Return the YAML of `recipes/finetune.py` as a dict.

    Length, batch size, optimizer and memory options are always present; settings that stay automatic are left out.
    """
    config: dict[str, Any] = {
        "model": job.model.name,
        "max_length": job.length,
        "per_device_train_batch_size": job.batch_size,
        "attn_implementation": f"ring_{job.layout}",
        "context_parallel_size": job.cp,
        "dp_replicate_size": job.dp_replicate if select_engine(job).family == "fsdp2" else job.dp,
    }
    if job.ulysses > 1:
        config["ulysses_size"] = job.ulysses
    if job.inner > 1:
        config["inner_ring_size"] = job.inner
    if job.transport != "auto":
        config["transport"] = job.transport
    if job.kernel != "auto":
        config["kernel"] = job.kernel
    config["memory_attention"] = _MEMORY_ATTENTION[job.checkpoint]
    activations = [name for name in ("layers", "attention") if name in job.offload]
    if activations:
        config["memory_offload"] = "all" if len(activations) == 2 else activations[0]
    if job.ffn_block:
        config["ffn_block"] = job.ffn_block
    if job.loss_block:
        config["loss_block"] = job.loss_block
    if job.fused:  # without its fused loss, which the plan does not count and training refuses on sharded weights
        config["use_liger_kernel"] = True
        config["liger_kernel_config"] = "{fused_linear_cross_entropy: false}"
    config["optim"] = job.optimizer
    if job.precision == "bf16":
        config["dtype"] = "bfloat16"
        config["bf16"] = False  # with bf16: true, Accelerate converts all weights that FSDP2 trains to fp32
    else:
        config["bf16"] = True
    return config


def list_unsupported_settings(job: TrainingJob) -> list[str]:
    """Return the settings of a job that the recipe has no option for, or that training refuses."""
    unsupported = []
    if job.lora:
        unsupported.append(
            f"adapters of rank {job.lora}: the recipe trains all parameters; add them with PEFT in a script"
        )
    if job.fp8:
        unsupported.append("linear layers in fp8")
    if job.fused and (job.ffn_block or job.loss_block):
        unsupported.append(
            "use_liger_kernel with ffn_block or loss_block: training refuses the combination, leave one of them out"
        )
    return unsupported


def make_launch_command(job: TrainingJob) -> str:
    """Return the program that starts the recipe: `accelerate launch` with a file and options, or plain Python."""
    engine, num_machines = select_engine(job), -(-job.devices // job.per_node)
    if engine is ONE_PROCESS:
        return "python"
    files = FILES[engine.family]
    sizes = num_machines, -(-job.devices // num_machines)
    is_multi_node = num_machines > 1
    same_kind = [name for (machines, _), name in files.items() if (machines > 1) == is_multi_node]
    file = files.get(sizes, (same_kind or [*files.values()])[-1])
    options = [f"--config_file configs/accelerate/{file}"]
    if sizes not in files:
        options.append(f"--num_processes {job.devices}")
        if is_multi_node:
            options.append(f"--num_machines {num_machines}")
    if is_multi_node:
        options.append(_MULTI_NODE_OPTIONS)
        if engine.family == "zero3":
            options.append("--deepspeed_multinode_launcher standard")
    if engine.family == "zero3" and job.zero < 3:
        options.append(f"--zero_stage {job.zero}")
    options += [option for state, option in engine.offload if state in job.offload]
    return " ".join(["accelerate launch", *options])


def format_launch(job: TrainingJob, name: str = "plan.yaml") -> str:
    """Return the YAML of a job and the command that runs it, for copying."""
    lines = [f"to run this plan, save as {name}:"]
    for key, value in make_recipe_config(job).items():
        lines.append(f"  {key}: {str(value).lower() if isinstance(value, bool) else value}")
    lines += [f"  # not included: {setting}" for setting in list_unsupported_settings(job)]
    lines += [
        "and launch it with:",
        f"  {make_launch_command(job)} \\",
        f"    recipes/finetune.py {name} --data <files> --output_dir <folder>",
    ]
    return "\n".join(lines)
