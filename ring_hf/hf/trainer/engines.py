"""The engines that hold weights, gradients and optimizer states, and what context parallelism asks of each.

To an engine, the shard of a sequence is a batch of its own. It takes the mean of the gradients over all ranks, as it
would for plain data parallelism, and may cut the weights over ranks that share a sequence as well as over those that
do not. It must be told which ranks read the same rows, and kept from rounding numbers that are not computed with: the
count of targets, the loss, the sums of gradients. `ENGINES` is the whole list; the config looks its row up by what
Accelerate runs, and `ProcessContext.engine` carries its name from there on. A model that Transformers sharded while
loading it is an engine of its own, which Accelerate does not know of: `engine_of` looks at the model, too.

Sources: Accelerate's `AcceleratorState.distributed_type`, `FullyShardedDataParallelPlugin` and `DeepSpeedPlugin`;
Transformers' `DistributedConfig`; FSDP2 (`torch.distributed.fsdp.fully_shard`), HSDP as its mesh of two axes; ZeRO
(Rajbhandari et al. 2020, arXiv 1910.02054).
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType

from ring_hf.memory import applied_to

from ..context import ProcessContext
from ..runtime.gradients import BY_AUTOGRAD, FROM_FSDP, FROM_ZERO3, GradientMethod

Rule = Callable[[Any, Any], str | None]  # (AcceleratorState, TrainingArguments) -> message


@dataclasses.dataclass(frozen=True)
class SameRows:
    """What Accelerate's data loader asks of a device mesh under DeepSpeed: how many neighbours read the same rows.

    Under DeepSpeed it looks at the axis `tp` alone, so that is its name here; no process group stands behind it.
    """

    num_ranks: int
    mesh_dim_names: tuple[str, ...] = ("tp",)

    def __getitem__(self, name: str) -> "SameRows":
        return self

    def size(self) -> int:
        return self.num_ranks


# What an engine is told before it wraps the model


def _adapt_nothing(state: Any, context_parallel_size: int) -> None:
    """DDP and FSDP version 1 read the mesh of the config, or need nothing."""


def _keep_fsdp_from_rounding(state: Any, context_parallel_size: int) -> None:
    """Have FSDP2 cast weights only, as autocast under DDP does.

    The policy that Accelerate makes for half precision also casts every tensor that goes into the model (the number of
    targets: 419 becomes 420 in bf16) and comes out of it (the loss), and sums gradients over ranks in half precision.
    """
    policy = state.fsdp_plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype is not None:
        exact = {"cast_forward_inputs": False, "output_dtype": None, "reduce_dtype": torch.float32}
        state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, **exact)


def _tell_deepspeed_same_rows(state: Any, context_parallel_size: int) -> None:
    if context_parallel_size > 1:
        state.ds_device_mesh = SameRows(context_parallel_size)


# What is refused of an engine's settings


def _best_of_shards(state: Any, args: Any) -> str | None:
    if not args.load_best_model_at_end or "SHARDED" not in str(state.fsdp_plugin.state_dict_type):
        return None
    return (
        "load_best_model_at_end=True with fsdp_state_dict_type SHARDED_STATE_DICT: a rank looks for the folder of a "
        "checkpoint that another may not have made yet, so ranks may choose different ones. Set fsdp_state_dict_type: "
        "FULL_STATE_DICT."
    )


def _half_precision(state: Any, args: Any) -> str | None:
    policy = state.fsdp_plugin.mixed_precision_policy
    dtype = getattr(policy, "buffer_dtype", None)
    if dtype in (None, torch.float32):
        return None
    return (
        f"FSDP version 1 with mixed precision casts buffers to {dtype}, among them the frequencies of RoPE, which are "
        "wrong then at long positions, and the number of targets. Set fsdp_version: 2, or train in fp32."
    )


def _tensor_parallel(state: Any, args: Any) -> str | None:
    size = state.deepspeed_plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 1)
    if size in (0, 1):
        return None
    return (
        f"tensor_parallel autotp_size={size} in the DeepSpeed config takes the mesh by which ranks find the rows that "
        "they share. Leave it out."
    )


def _sequence_parallel(state: Any, args: Any) -> str | None:
    size = state.deepspeed_plugin.deepspeed_config.get("sequence_parallel_size", 1)
    if size == 1:
        return None
    return (
        f"sequence_parallel_size={size} in the DeepSpeed config starts DeepSpeed's own sequence parallelism. Leave it "
        f"out and set context_parallel_size={size} in the ContextParallelConfig."
    )


def _fused_loss(state: Any, args: Any) -> str | None:
    fused = (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    if not args.use_liger_kernel or not fused:
        return None
    return (
        "use_liger_kernel=True takes the weights of the LM head outside of its layer, where this engine has shards of "
        'them. Set liger_kernel_config={"fused_linear_cross_entropy": False}, and memory.apply(loss_block="auto") for '
        "the memory of the logits."
    )


# What is worth knowing about them, in the log


def _whole_gradients(state: Any, args: Any) -> str | None:
    each = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
    if args.gradient_accumulation_steps == 1 or each:
        return None
    return (
        "gradient_accumulation_steps > 1 keeps the gradients of whole weights on every rank between micro-batches. "
        'accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} keeps shards of them, for one '
        "reduce_scatter more in each micro-batch."
    )


def _no_final_model(state: Any, args: Any) -> str | None:
    if "SHARDED" not in str(state.fsdp_plugin.state_dict_type):
        return None
    return (
        "fsdp_state_dict_type SHARDED_STATE_DICT: checkpoints hold shards, and save_model writes no model. Set "
        "FULL_STATE_DICT for the final model, or merge a checkpoint with `accelerate merge-weights "
        "checkpoint-N/pytorch_model_fsdp_0 folder`."
    )


def _no_gathered_model(state: Any, args: Any) -> str | None:
    if state.deepspeed_plugin.zero3_save_16bit_model:
        return None
    return (
        "stage3_gather_16bit_weights_on_model_save is off: save_model writes a DeepSpeed checkpoint, from which its "
        "zero_to_fp32.py makes the model."
    )


# The rows


def _zero_stage(state: Any) -> int | None:
    return state.deepspeed_plugin.zero_stage if state.distributed_type == DistributedType.DEEPSPEED else None


def _fsdp_version(state: Any) -> int | None:
    return state.fsdp_plugin.fsdp_version if state.distributed_type == DistributedType.FSDP else None


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: as users know it.
        is_running: whether it is the one of an `AcceleratorState`.
        cuts_over_mesh: whether it cuts weights over the axes dp_shard x cp of the config's mesh; others cut them over
            all ranks or not at all.
        gradients: how a trial step takes gradients; None where it cannot be taken.
        serves_blocks: whether what `ring_hf.memory` computes in blocks finds whole weights.
        is_deepspeed: whether DeepSpeed runs the backward pass.
        adapt: tells it what it needs to know, before it wraps the model.
        rules: what is refused of its settings.
        notices: what is said about them in the log.
    """

    name: str
    is_running: Callable[[Any], bool]
    cuts_over_mesh: bool = False
    gradients: GradientMethod | None = BY_AUTOGRAD
    serves_blocks: bool = True
    is_deepspeed: bool = False
    adapt: Callable[[Any, int], None] = _adapt_nothing
    rules: tuple[Rule, ...] = ()
    notices: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return self.name


_AT_LOADING = "FSDP2 at loading"
_REPLICATED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
_ZERO: dict[str, Any] = {"is_deepspeed": True, "adapt": _tell_deepspeed_same_rows}
_ZERO_RULES = (_tensor_parallel, _sequence_parallel)
_ROWS = (
    Engine("DDP", lambda state: state.distributed_type in _REPLICATED),
    Engine(
        "FSDP1",
        lambda state: _fsdp_version(state) == 1,
        gradients=None,
        serves_blocks=False,
        rules=(_best_of_shards, _half_precision, _fused_loss),
        notices=(_no_final_model,),
    ),
    Engine(
        "FSDP2",
        lambda state: _fsdp_version(state) == 2,
        cuts_over_mesh=True,
        gradients=FROM_FSDP,
        adapt=_keep_fsdp_from_rounding,
        rules=(_best_of_shards, _fused_loss),
        notices=(_whole_gradients, _no_final_model),
    ),
    Engine(_AT_LOADING, lambda state: False, gradients=FROM_FSDP),
    Engine("ZeRO-1", lambda state: _zero_stage(state) == 1, rules=_ZERO_RULES, **_ZERO),
    Engine("ZeRO-2", lambda state: _zero_stage(state) == 2, rules=_ZERO_RULES, **_ZERO),
    Engine(
        "ZeRO-3",
        lambda state: _zero_stage(state) == 3,
        gradients=FROM_ZERO3,
        rules=(*_ZERO_RULES, _fused_loss),
        notices=(_no_gathered_model,),
        **_ZERO,
    ),
)
ENGINES: dict[str, Engine] = {row.name: row for row in _ROWS}


def find_engine(state: Any) -> Engine:
    """Return the engine of an `AcceleratorState`.

    Raises:
        ValueError: if it is none of `ENGINES`.
    """
    running = [engine for engine in ENGINES.values() if engine.is_running(state)]
    if not running:
        kind = getattr(state.distributed_type, "value", state.distributed_type)
        kind = f"{kind} with ZeRO stage {_zero_stage(state)}" if _zero_stage(state) is not None else kind
        raise ValueError(
            f"The engine {kind} is not proven with context parallelism. Use one of {', '.join(ENGINES)}: "
            "`accelerate launch` with --multi_gpu, --use_fsdp --fsdp_version 2, or --use_deepspeed."
        )
    return running[0]


def check_engine(accelerator: Any) -> str | None:
    """Return why context parallelism cannot run on what an `Accelerator` runs, or None."""
    state = accelerator.state
    try:
        engine = find_engine(state)
    except ValueError as error:
        return str(error)
    if accelerator.device.type not in ("cpu", "cuda"):
        return f"Context parallelism runs on CPU and CUDA devices, but this process has {accelerator.device.type}."
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not engine.name.startswith("FSDP"):
        return (
            f"FSDP was asked for, but Accelerate runs {engine} here (it has no FSDP on CPUs), with whole copies of "
            "the weights. Start on CUDA devices, or leave FSDP out."
        )
    return None


def engine_of(context: ProcessContext, model: Any) -> Engine:
    """Return the engine that holds the weights of a model in this process."""
    return ENGINES[_AT_LOADING if _is_sharded_at_loading(model) else context.engine]


def _is_sharded_at_loading(model: Any) -> bool:
    return getattr(model, "is_distributed_loading_by_transformers", False)


def weights_error(context: ProcessContext, model: Any) -> str | None:
    """Return why the way in which somebody else sharded the weights of a model cannot be trained with, or None."""
    if not _is_sharded_at_loading(model):
        meshes = (p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
        of_the_config = ENGINES[context.engine].cuts_over_mesh
        mesh = next((m for m in meshes if not (of_the_config and _is_of_weights(m))), None)
        if mesh is None:
            return None
        return (
            f"Parameters of the model are DTensors on {mesh}, and {context.engine} did not shard them so: gradients "
            "of ranks that share a sequence would not be added up. Leave the sharding of weights to FSDP2 "
            "(`accelerate launch --use_fsdp --fsdp_version 2`), to DeepSpeed, or to "
            "from_pretrained(distributed_config=DistributedConfig(fsdp_size=...))."
        )
    config = model.config.distributed_config
    sizes = {name: getattr(config, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size")}
    more = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    num_processes = context.size * context.num_replicas
    if more:
        return (
            f"The model was loaded with DistributedConfig({more}): ranks that share a sequence would be taken for "
            f"ranks that share a layer. Load it with DistributedConfig(fsdp_size={num_processes})."
        )
    if context.engine != "DDP":
        return (
            f"The model was sharded by Transformers while it was loaded, and {context.engine} was asked for as well. "
            "Leave distributed_config out, or start without FSDP and DeepSpeed."
        )
    if config.fsdp_mixed_precision:
        return (
            "DistributedConfig(fsdp_mixed_precision=True) also casts what goes into the model, the number of targets "
            "among it. Leave it out, and set bf16=True in TrainingArguments."
        )
    name = _uneven_tied_weight(model, config.fsdp_size)
    if name is not None:
        return (
            f"{name} is tied to another weight and has {model.get_parameter(name).shape[0]} rows, which "
            f"{config.fsdp_size} ranks cannot share evenly: FSDP2 then holds a copy of the other, which no step "
            f"updates. Pad it (model.resize_token_embeddings(pad_to_multiple_of={config.fsdp_size})) and save the "
            "model before it is sharded, or leave distributed_config out and have Accelerate's FSDP2 shard it."
        )
    return None


def _is_of_weights(mesh: Any) -> bool:
    """Return whether a mesh is one over which Accelerate's FSDP2 cuts weights with the config."""
    return bool(mesh.mesh_dim_names) and set(mesh.mesh_dim_names) <= {"dp_replicate", "dp_shard", "cp", "dp_shard_cp"}


def _uneven_tied_weight(model: Any, num_shards: int) -> str | None:
    """Return the name of a weight of which FSDP2 pads two copies where there should be one; it is tied after sharding.

    See `FSDPParam.reset_sharded_param` of torch 2.13: an uneven shard moves to a padded buffer, each time anew.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names and parameter.shape[0] % num_shards:
            return names[id(parameter)]
        names[id(parameter)] = name
    return None


def gradient_method(engine: Engine, reason: str) -> GradientMethod:
    """Return how an engine's trial step takes gradients.

    Raises:
        ValueError: on every rank, if it cannot be taken. `reason` says why it is needed.
    """
    if engine.gradients is None:
        raise ValueError(
            f"A trial step is needed, because {reason}, but it cannot be taken on {engine}: the model does not run "
            "outside of its wrapper. Use FSDP2 (fsdp_version: 2)."
        )
    return engine.gradients


def blocks_error(engine: Engine, model: Any) -> str | None:
    """Return why an engine cannot run what `memory.apply` did to a model, or None."""
    applied = applied_to(model)
    if engine.serves_blocks or applied is None:
        return None
    if (applied.config.ffn_block, applied.config.loss_block) == (None, None):
        return None
    return (
        f"memory.apply(ffn_block={applied.config.ffn_block!r}, loss_block={applied.config.loss_block!r}) needs whole "
        f"weights, of which {engine} shows views of a flat one. Use FSDP2 (fsdp_version: 2), or set both to None."
    )


def checkpoints_layers(state: Any) -> bool:
    """Return whether an engine checkpoints activations by itself (`activation_checkpointing` of `fsdp_config`)."""
    plugin = getattr(state, "fsdp_plugin", None)
    return bool(getattr(plugin, "activation_checkpointing", False))


def messages(rules: tuple[Rule, ...], state: Any, args: Any) -> list[str]:
    """Return what the rules of an engine say of its settings."""
    results = (rule(state, args) for rule in rules)
    return [message for message in results if message is not None]
