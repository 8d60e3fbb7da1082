"""The engines that hold weights, gradients and optimizer states, and how context parallelism configures each.

For an engine, the shard of a sequence is a batch of its own. It averages gradients over all ranks, as in plain data
parallelism, and may shard weights both over ranks that share a sequence and over those that do not. It has to know
which ranks read the same rows, and must not round the number of targets, the loss, or the sums of gradients. `ENGINES`
is the complete list. The config chooses an entry from Accelerate's state and stores its name in
`ProcessContext.engine`. A model that Transformers sharded while loading it counts as another engine, which Accelerate
does not see: `engine_of` checks the model as well.

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

from ring_hf.memory import applied_to, sharding_error

from ..context import ProcessContext
from ..runtime.gradients import AUTOGRAD_GRADIENTS, FSDP2_GRADIENTS, ZERO3_GRADIENTS, GradientMethod

Rule = Callable[[Any, Any], str | None]  # (AcceleratorState, TrainingArguments) -> message or None


@dataclasses.dataclass(frozen=True)
class SameRowsMesh:
    """The part of a device mesh that Accelerate's data loader reads under DeepSpeed: how many neighbouring ranks read
    the same rows.

    Under DeepSpeed it reads the axis `tp` alone, hence the name here. There is no process group.
    """

    num_ranks: int
    mesh_dim_names: tuple[str, ...] = ("tp",)

    def __getitem__(self, name: str) -> "SameRowsMesh":
        return self

    def size(self) -> int:
        return self.num_ranks


# Settings that an engine gets before it wraps the model


def _keep_settings(state: Any, context_parallel_size: int) -> None:
    """DDP and FSDP version 1 read the mesh of the config, or need no setting."""


def _limit_fsdp_casts(state: Any, context_parallel_size: int) -> None:
    """Have FSDP2 cast weights only, as autocast under DDP does.

    In half precision, Accelerate's policy also casts every input of the model (the number of targets: 419 becomes 420
    in bf16) and its outputs (the loss), and sums gradients over ranks in half precision.
    """
    policy = state.fsdp_plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype is not None:
        exact = {"cast_forward_inputs": False, "output_dtype": None, "reduce_dtype": torch.float32}
        state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, **exact)


def _set_deepspeed_mesh(state: Any, context_parallel_size: int) -> None:
    if context_parallel_size > 1:
        state.ds_device_mesh = SameRowsMesh(context_parallel_size)


# Rules: settings that are refused


def _check_best_checkpoint(state: Any, args: Any) -> str | None:
    if not args.load_best_model_at_end or "SHARDED" not in str(state.fsdp_plugin.state_dict_type):
        return None
    return (
        "load_best_model_at_end=True with fsdp_state_dict_type SHARDED_STATE_DICT: a rank may look for the folder of "
        "a checkpoint before another rank has created it, so ranks may choose different ones. Set "
        "fsdp_state_dict_type: FULL_STATE_DICT."
    )


def _check_fsdp1_dtype(state: Any, args: Any) -> str | None:
    policy = state.fsdp_plugin.mixed_precision_policy
    dtype = getattr(policy, "buffer_dtype", None)
    if dtype in (None, torch.float32):
        return None
    return (
        f"FSDP version 1 with mixed precision casts buffers to {dtype}, among them the frequencies of RoPE, which "
        "makes long positions wrong, and it rounds the number of targets. Set fsdp_version: 2, or train in fp32."
    )


def _check_tensor_parallel(state: Any, args: Any) -> str | None:
    size = state.deepspeed_plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 1)
    if size in (0, 1):
        return None
    return (
        f"tensor_parallel autotp_size={size} in the DeepSpeed config uses the device mesh by which the data loader "
        "finds ranks that share rows. Leave it out."
    )


def _check_sequence_parallel(state: Any, args: Any) -> str | None:
    size = state.deepspeed_plugin.deepspeed_config.get("sequence_parallel_size", 1)
    if size == 1:
        return None
    return (
        f"sequence_parallel_size={size} in the DeepSpeed config starts DeepSpeed's own sequence parallelism. Leave it "
        f"out and set context_parallel_size={size} in the ContextParallelConfig."
    )


def _check_fused_loss(state: Any, args: Any) -> str | None:
    fused = (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    if not args.use_liger_kernel or not fused:
        return None
    return (
        "use_liger_kernel=True reads the weights of the LM head outside of its layer, where this engine holds shards "
        'of them. Set liger_kernel_config={"fused_linear_cross_entropy": False}. For the memory of the logits, use '
        'memory.apply(loss_block="auto").'
    )


# Notices: settings that the log explains


def _notice_whole_gradients(state: Any, args: Any) -> str | None:
    sync_each_batch = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
    if args.gradient_accumulation_steps == 1 or sync_each_batch:
        return None
    return (
        "gradient_accumulation_steps > 1 keeps the gradients of whole weights on every rank between micro-batches. "
        'accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} keeps shards of them, at '
        "the cost of one more reduce_scatter in each micro-batch."
    )


def _notice_sharded_checkpoints(state: Any, args: Any) -> str | None:
    if "SHARDED" not in str(state.fsdp_plugin.state_dict_type):
        return None
    return (
        "fsdp_state_dict_type SHARDED_STATE_DICT: checkpoints hold shards, and save_model writes no model. Set "
        "FULL_STATE_DICT for the final model, or merge a checkpoint with `accelerate merge-weights "
        "checkpoint-N/pytorch_model_fsdp_0 folder`."
    )


def _notice_missing_model(state: Any, args: Any) -> str | None:
    if state.deepspeed_plugin.zero3_save_16bit_model:
        return None
    return (
        "stage3_gather_16bit_weights_on_model_save is off: save_model writes a DeepSpeed checkpoint. "
        "Convert it with its zero_to_fp32.py."
    )


# The engines


def _zero_stage(state: Any) -> int | None:
    return state.deepspeed_plugin.zero_stage if state.distributed_type == DistributedType.DEEPSPEED else None


def _fsdp_version(state: Any) -> int | None:
    return state.fsdp_plugin.fsdp_version if state.distributed_type == DistributedType.FSDP else None


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: the name that users know.
        is_running: returns whether an `AcceleratorState` runs this engine.
        cuts_over_mesh: whether it shards weights over the axes dp_shard x cp of the config's mesh. Others shard them
            over all ranks or not at all.
        gradient_method: how a trial step computes gradients; None if a trial step cannot run.
        supports_blocks: whether layers that `ring_hf.memory` computes in blocks can read whole weights.
        is_deepspeed: whether DeepSpeed runs the backward pass.
        adapt: changes an `AcceleratorState` for a context parallel size, before the engine wraps the model.
        rules: checks of its settings, which refuse them.
        notices: checks of its settings, which are logged.
    """

    name: str
    is_running: Callable[[Any], bool]
    cuts_over_mesh: bool = False
    gradient_method: GradientMethod | None = AUTOGRAD_GRADIENTS
    supports_blocks: bool = True
    is_deepspeed: bool = False
    adapt: Callable[[Any, int], None] = _keep_settings
    rules: tuple[Rule, ...] = ()
    notices: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return self.name


_FSDP2_AT_LOADING = "FSDP2 at loading"
_REPLICATED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
_ZERO: dict[str, Any] = {"is_deepspeed": True, "adapt": _set_deepspeed_mesh}
_ZERO_RULES = (_check_tensor_parallel, _check_sequence_parallel)
_ALL_ENGINES = (
    Engine("DDP", lambda state: state.distributed_type in _REPLICATED),
    Engine(
        "FSDP1",
        lambda state: _fsdp_version(state) == 1,
        gradient_method=None,
        supports_blocks=False,
        rules=(_check_best_checkpoint, _check_fsdp1_dtype, _check_fused_loss),
        notices=(_notice_sharded_checkpoints,),
    ),
    Engine(
        "FSDP2",
        lambda state: _fsdp_version(state) == 2,
        cuts_over_mesh=True,
        gradient_method=FSDP2_GRADIENTS,
        adapt=_limit_fsdp_casts,
        rules=(_check_best_checkpoint, _check_fused_loss),
        notices=(_notice_whole_gradients, _notice_sharded_checkpoints),
    ),
    Engine(_FSDP2_AT_LOADING, lambda state: False, gradient_method=FSDP2_GRADIENTS),
    Engine("ZeRO-1", lambda state: _zero_stage(state) == 1, rules=_ZERO_RULES, **_ZERO),
    Engine("ZeRO-2", lambda state: _zero_stage(state) == 2, rules=_ZERO_RULES, **_ZERO),
    Engine(
        "ZeRO-3",
        lambda state: _zero_stage(state) == 3,
        gradient_method=ZERO3_GRADIENTS,
        rules=(*_ZERO_RULES, _check_fused_loss),
        notices=(_notice_missing_model,),
        **_ZERO,
    ),
)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ALL_ENGINES}


def find_engine(state: Any) -> Engine:
    """Return the engine of an `AcceleratorState`.

    Raises:
        ValueError: if it is not in `ENGINES`.
    """
    for engine in ENGINES.values():
        if engine.is_running(state):
            return engine
    name = getattr(state.distributed_type, "value", state.distributed_type)
    if _zero_stage(state) is not None:
        name = f"{name} with ZeRO stage {_zero_stage(state)}"
    raise ValueError(
        f"The engine {name} is not proven with context parallelism. Use one of {', '.join(ENGINES)}: "
        "`accelerate launch` with --multi_gpu, --use_fsdp --fsdp_version 2, or --use_deepspeed."
    )


def check_engine(accelerator: Any) -> str | None:
    """Return an error message if context parallelism cannot run on an `Accelerator`'s engine or device, else None."""
    state = accelerator.state
    try:
        engine = find_engine(state)
    except ValueError as error:
        return str(error)
    if accelerator.device.type not in ("cpu", "cuda"):
        return f"Context parallelism runs on CPU and CUDA devices, but this process has {accelerator.device.type}."
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not engine.name.startswith("FSDP"):
        return (
            f"FSDP was requested, but Accelerate runs {engine} here (it has no FSDP on CPUs), with whole copies of "
            "the weights. Start on CUDA devices, or leave FSDP out."
        )
    return None


def engine_of(context: ProcessContext, model: Any) -> Engine:
    """Return the engine that holds the weights of a model in this process."""
    return ENGINES[_FSDP2_AT_LOADING if _is_sharded_at_loading(model) else context.engine]


def _is_sharded_at_loading(model: Any) -> bool:
    return getattr(model, "is_distributed_loading_by_transformers", False)


def check_sharded_weights(context: ProcessContext, model: Any) -> str | None:
    """Return an error message if the weights of a model are sharded in a way that cannot be trained, else None."""
    if not _is_sharded_at_loading(model):
        meshes = (p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
        uses_mesh = ENGINES[context.engine].cuts_over_mesh
        foreign_mesh = next((mesh for mesh in meshes if not (uses_mesh and _is_accelerate_mesh(mesh))), None)
        if foreign_mesh is None:
            return None
        return (
            f"Parameters of the model are DTensors on {foreign_mesh}, and {context.engine} did not create them: "
            "gradients of ranks that share a sequence would not be summed. Leave the sharding of weights to FSDP2 "
            "(`accelerate launch --use_fsdp --fsdp_version 2`), to DeepSpeed, or to "
            "from_pretrained(distributed_config=DistributedConfig(fsdp_size=...)) of Transformers 5.23 or newer."
        )
    config = model.config.distributed_config
    sizes = {name: getattr(config, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size")}
    other_sizes = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    num_processes = context.size * context.num_replicas
    if other_sizes:
        return (
            f"The model was loaded with DistributedConfig({other_sizes}), so ranks that share a sequence would be "
            f"treated as ranks that share a layer. Load it with DistributedConfig(fsdp_size={num_processes})."
        )
    if context.engine != "DDP":
        return (
            f"The model was sharded by Transformers while it was loaded, and {context.engine} was requested as well. "
            "Leave distributed_config out, or start without FSDP and DeepSpeed."
        )
    if config.fsdp_mixed_precision:
        return (
            "DistributedConfig(fsdp_mixed_precision=True) also casts the inputs of the model, among them the number "
            "of targets. Leave it out, and set bf16=True in TrainingArguments."
        )
    name = _find_uneven_tied_weight(model, config.fsdp_size)
    if name is not None:
        return (
            f"{name} is tied to another weight and has {model.get_parameter(name).shape[0]} rows, which "
            f"{config.fsdp_size} ranks cannot share evenly: FSDP2 then keeps a copy of the other weight that no step "
            f"updates. Pad it (model.resize_token_embeddings(pad_to_multiple_of={config.fsdp_size})) and save the "
            "model before it is sharded, or leave distributed_config out and have Accelerate's FSDP2 shard it."
        )
    return None


def _is_accelerate_mesh(mesh: Any) -> bool:
    """Return whether Accelerate's FSDP2 shards weights over this mesh, as built by the config."""
    return bool(mesh.mesh_dim_names) and set(mesh.mesh_dim_names) <= {"dp_replicate", "dp_shard", "cp", "dp_shard_cp"}


def _find_uneven_tied_weight(model: Any, num_shards: int) -> str | None:
    """Return the name of a tied weight that FSDP2 turns into two copies, since it is tied after sharding, or None.

    See `FSDPParam.reset_sharded_param` of torch 2.13: it copies an uneven shard to a new padded buffer on every call.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names and parameter.shape[0] % num_shards:
            return names[id(parameter)]
        names[id(parameter)] = name
    return None


def require_gradient_method(engine: Engine, reason: str) -> GradientMethod:
    """Return how an engine's trial step computes gradients.

    Args:
        reason: why a trial step is needed, for the error.

    Raises:
        ValueError: on every rank, if a trial step cannot run on this engine.
    """
    if engine.gradient_method is None:
        raise ValueError(
            f"A trial step is needed, because {reason}, but it cannot run on {engine}: the model does not run outside "
            "of its wrapper. Use FSDP2 (fsdp_version: 2)."
        )
    return engine.gradient_method


def check_blocks(engine: Engine, model: Any) -> str | None:
    """Return an error message if an engine cannot run the blocks of `memory.apply` in a model, else None."""
    applied = applied_to(model)
    if engine.supports_blocks or applied is None:
        return sharding_error(model)
    if (applied.config.ffn_block, applied.config.loss_block) == (None, None):
        return None
    return (
        f"memory.apply(ffn_block={applied.config.ffn_block!r}, loss_block={applied.config.loss_block!r}) needs whole "
        f"weights, but {engine} exposes them as views of a flat one. Use FSDP2 (fsdp_version: 2), or set both to None."
    )


def checkpoints_layers(state: Any) -> bool:
    """Return whether the engine checkpoints activations itself (`activation_checkpointing` of `fsdp_config`)."""
    plugin = getattr(state, "fsdp_plugin", None)
    return bool(getattr(plugin, "activation_checkpointing", False))


def collect_messages(rules: tuple[Rule, ...], state: Any, args: Any) -> list[str]:
    """Return the messages of those rules or notices that apply to an `AcceleratorState` and `TrainingArguments`."""
    results = (rule(state, args) for rule in rules)
    return [message for message in results if message is not None]
