"""The runs of the launched script on every engine: cases of `tests/trainer/cases.py`, and arguments for an engine.

Accelerate has no FSDP on CPUs: it runs DDP instead, with the right numbers. `engine_arguments` pretends that there is
another device, and then Accelerate's own code runs. Every run reports what trained it (`state_of`). DeepSpeed runs on
CPUs, but it does not shard parameters as small as these unless its thresholds are 0, and it would first compile a
kernel for shared memory, which is left out.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ring_hf.hf.trainer.engines import engine_of
from ring_hf.verify.model_families import tiny
from tests.engines.families import BY_DEFAULT, WITH_OPTIONS, WITHOUT_OPTIONS
from tests.trainer.cases import FP32_AT_THE_RATE_OF_BF16, Case, attention_of

# A rank's 96 tokens of a micro-batch are computed in five blocks.
MEMORY_OPTIONS: dict[str, dict[str, Any]] = {
    "saved": {"attention": "save", "ffn_block": None, "loss_block": None},
    "all": {"attention": "save", "offload": "all", "ffn_block": 20, "loss_block": 20},
}
AT_LOADING = "FSDP2 at loading"  # by Transformers
VOCABULARY = 67  # sharded over 2 or 4 ranks, the last has fewer rows


@dataclass(frozen=True)
class EngineCase:
    """One run of the Trainer on one engine.

    Attributes:
        run: how sequences are shared, the data, and the dtype.
        tied: whether the head is the embedding.
        quantized: whether adapters are trained on weights of 4 bits (QLoRA).
        memory_options: a name of `MEMORY_OPTIONS`.
        on_host: whether weights, gradients and optimizer states are in host memory, by the engine's own offload.
        sync_each_batch: whether gradients are reduced in every micro-batch, so that only shards of them are kept.
        settings: further arguments of the `ContextParallelConfig`.
    """

    engine: str
    run: Case
    tied: bool = False
    quantized: bool = False
    memory_options: str = ""
    on_host: bool = False
    sync_each_batch: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        flags = {
            "tied": self.tied,
            "4bit": self.quantized,
            self.memory_options: True,
            "host": self.on_host,
            "each-batch": self.sync_each_batch,
        }
        set_flags = [flag for flag, is_set in flags.items() if is_set]
        return "-".join(filter(None, (self.engine, self.run.name, *set_flags)))

    def reference(self) -> "EngineCase":
        return EngineCase("DDP", self.run.reference(), self.tied, self.quantized)


def family_of(engine: str) -> str:
    """Return the family of an engine: all engines of a family run in one launch."""
    return "ZeRO" if engine.startswith("ZeRO") else "FSDP"


def world_cases(world_size: int, family: str) -> list[EngineCase]:
    """Return all runs of the launch of a family of engines with `world_size` processes."""
    cases = [case for case in CASES if case.run.cp * case.run.dp == world_size and family_of(case.engine) == family]
    engines = sorted({case.engine for case in cases if case.run.bf16 and case.engine.startswith("ZeRO")})
    return cases + [without_context_parallelism(engine, world_size) for engine in engines]


def reference_cases() -> list[EngineCase]:
    """Return every distinct one-process run that a case is compared with, and the fp32 run for those in bf16."""
    references = {case.reference().name: case.reference() for case in CASES}
    return [*references.values(), EngineCase("DDP", replace(FP32_AT_THE_RATE_OF_BF16, steps=STEPS))]


ALL = bool(os.environ.get("RING_HF_ALL_CASES"))
STEPS = 20 if ALL else 5


def _runs(engine: str, world_size: int) -> Iterator[EngineCase]:
    for case in _runs_of_20_steps(engine, world_size):
        yield replace(case, run=replace(case.run, steps=STEPS))


def _runs_of_20_steps(engine: str, world_size: int) -> Iterator[EngineCase]:
    hole = {"data": "hole", "hole_layout": "zigzag"}
    bf16 = {"bf16": True, "learning_rate": 1e-4}
    for cp, dp in {2: [(2, 1)], 4: [(2, 2)]}[world_size]:
        mesh = f"dp{dp}xcp{cp}"
        yield EngineCase(engine, Case(f"{mesh}", "zigzag", cp, dp))
        yield EngineCase(engine, Case(f"{mesh}-hole", "zigzag", cp, dp, **hole, checkpointing="non-reentrant"))
        if engine != "FSDP1":  # refused in half precision, and for a model that is not proven by name
            yield EngineCase(engine, Case(f"{mesh}-bf16", "zigzag", cp, dp, **bf16))
        if world_size == 2 and engine != "FSDP1":
            yield EngineCase(engine, Case(f"{mesh}-lora", "zigzag", cp, dp, lora=True, checkpointing="non-reentrant"))
            if engine != AT_LOADING:  # which refuses tied weights with 67 rows
                yield EngineCase(engine, Case(f"{mesh}", "zigzag", cp, dp), tied=True)
            yield EngineCase(engine, Case(f"{mesh}-lora-bf16", "zigzag", cp, dp, lora=True, **bf16))
        if engine in ("FSDP2", "ZeRO-3"):
            for memory_options in MEMORY_OPTIONS if world_size == 2 else ("all",):
                run = Case(mesh, "zigzag", cp, dp)
                yield EngineCase(engine, run, memory_options=memory_options)
                yield EngineCase(engine, replace(run, name=f"{mesh}-hole", **hole), memory_options=memory_options)
            if engine == "FSDP2":
                yield EngineCase(engine, Case(f"{mesh}-hole", "zigzag", cp, dp, **hole), sync_each_batch=True)
            if world_size == 2:
                yield EngineCase(engine, Case(f"{mesh}-broken", "zigzag", cp, dp, broken="local-positions"))
                yield EngineCase(engine, Case(mesh, "zigzag", cp, dp), tied=True, memory_options="all")
                yield EngineCase(
                    engine, Case(f"{mesh}-hole", "zigzag", cp, dp, **hole), memory_options="all", on_host=True
                )
                yield EngineCase(engine, Case(f"{mesh}-lora", "zigzag", cp, dp, lora=True), memory_options="all")
                yield EngineCase(
                    engine, Case(f"{mesh}-lora", "zigzag", cp, dp, lora=True), quantized=True, memory_options="all"
                )
                yield EngineCase(engine, Case(f"{mesh}-moe", "zigzag", cp, dp, model="mixtral"))
                yield EngineCase(engine, Case(f"{mesh}-moe", "zigzag", cp, dp, model="mixtral"), memory_options="all")
        if engine == AT_LOADING:
            yield EngineCase(engine, Case(f"{mesh}-hole", "zigzag", cp, dp, **hole), memory_options="all")
        if engine == "ZeRO-2" and world_size == 2:
            yield EngineCase(
                engine, Case(f"{mesh}-hole", "zigzag", cp, dp, **hole), memory_options="all", on_host=True
            )


def without_context_parallelism(engine: str, world_size: int) -> EngineCase:
    """Return a run of plain data parallelism in bf16 on an engine: DeepSpeed keeps weights in bf16, one process does
    not."""
    run = Case(f"dp{world_size}-plain-bf16", None, 1, world_size, bf16=True, learning_rate=1e-4, steps=STEPS)
    return EngineCase(engine, run)


ALL_CASES = [
    *_runs("FSDP2", 2),
    *_runs("FSDP2", 4),
    *_runs("FSDP1", 2),
    *_runs(AT_LOADING, 2),
    *_runs(AT_LOADING, 4),
    *_runs("ZeRO-1", 2),
    *_runs("ZeRO-2", 2),
    *_runs("ZeRO-2", 4),
    *_runs("ZeRO-3", 2),
    *_runs("ZeRO-3", 4),
]
_HSDP = {"dp_replicate_size": 2}
ALL_CASES += [replace(case, engine="HSDP", settings=_HSDP) for case in _runs("FSDP2", 4)]
ALL_CASES += [
    EngineCase(engine, Case(f"dp1xcp2-{name}", "zigzag", 2, model=name, steps=3), memory_options=memory_options)
    for engine in ("FSDP2", "ZeRO-3")
    for memory_options, names in (("all", WITH_OPTIONS), ("", WITHOUT_OPTIONS))
    for name in names
]
# The runs without RING_HF_ALL_CASES: every engine, every memory option, and the least similar combinations.
_SAMPLE = """
    FSDP1-dp1xcp2-hole
    FSDP2-dp1xcp2-bf16
    FSDP2-dp1xcp2-broken
    FSDP2-dp1xcp2-hole
    FSDP2-dp1xcp2-hole-all
    FSDP2-dp1xcp2-hole-all-host
    FSDP2-dp1xcp2-hole-each-batch
    FSDP2-dp1xcp2-hole-saved
    FSDP2-dp1xcp2-lora-4bit-all
    FSDP2-dp1xcp2-lora-bf16
    FSDP2-dp1xcp2-moe-all
    FSDP2-dp1xcp2-tied-all
    FSDP2-dp2xcp2-hole-all
    FSDP2 at loading-dp1xcp2-hole-all
    HSDP-dp2xcp2-hole
    ZeRO-1-dp1xcp2
    ZeRO-1-dp1xcp2-bf16
    ZeRO-2-dp1xcp2
    ZeRO-2-dp1xcp2-hole-all-host
    ZeRO-3-dp1xcp2-bf16
    ZeRO-3-dp1xcp2-broken
    ZeRO-3-dp1xcp2-hole
    ZeRO-3-dp1xcp2-hole-all
    ZeRO-3-dp1xcp2-hole-all-host
    ZeRO-3-dp1xcp2-hole-saved
    ZeRO-3-dp1xcp2-lora-4bit-all
    ZeRO-3-dp1xcp2-lora-bf16
    ZeRO-3-dp1xcp2-moe-all
    ZeRO-3-dp1xcp2-tied-all
"""
_SAMPLED = {line.strip() for line in _SAMPLE.strip().splitlines()}
_SAMPLED |= {f"{engine}-dp1xcp2-{name}-all" for engine, name in BY_DEFAULT.items()}
CASES = ALL_CASES if ALL else [case for case in ALL_CASES if case.name in _SAMPLED]


def build_model(case: EngineCase, folder: Path, sizes: dict[str, Any] | None = None) -> torch.nn.Module:
    """Return the same random model for every engine.

    Args:
        folder: where a model that is sharded at loading is saved first.
        sizes: arguments of its `DistributedConfig`.
    """
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": case.tied,
        "attn_implementation": attention_of(case.run.layout),
    }
    model: Any
    if case.run.model == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, output_router_logits=True))
    elif case.run.model == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        # One process computes with "eager": not every family has sinks or soft-capping with sdpa.
        model = tiny(case.run.model, "eager" if case.run.layout is None else attention_of(case.run.layout)).float()
    loading: dict[str, Any] = {}
    if case.engine == AT_LOADING:
        loading["distributed_config"] = DistributedConfig(**(sizes or {"fsdp_size": int(os.environ["WORLD_SIZE"])}))
    if case.quantized:
        # FSDP shards weights that have the dtype of all others. Each fp32 number stores 8 weights.
        storage = {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_compute_dtype": torch.float32}
        loading["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **storage)
    if loading:
        saved = folder / f"{case.name} to load"
        with PartialState(cpu=True).main_process_first():  # only the main process writes
            model.save_pretrained(saved)
        loading["attn_implementation"] = attention_of(case.run.layout)
        model = AutoModelForCausalLM.from_pretrained(saved, **loading)
    if not case.run.lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@contextmanager
def engine_arguments(engine: str, on_host: bool = False) -> Iterator[dict[str, Any]]:
    """Context in which a Trainer with the yielded arguments runs on an engine.

    Args:
        on_host: whether the engine keeps its states in host memory. It is not pinned, since there is no GPU.
    """
    AcceleratorState._reset_state()
    if engine.startswith("ZeRO"):
        yield {"deepspeed": _deepspeed_config(int(engine[-1]), on_host)}
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
        return
    version = {"FSDP1": 1, "FSDP2": 2, "HSDP": 2}.get(engine)
    if version is None:
        yield {}
        return
    environment = dict(os.environ)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    settings: dict[str, Any] = {
        "version": version,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": False,
    }
    if version == 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        settings |= {"sync_module_states": False, "use_orig_params": True}
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(on_host).lower()
    unpinned = partial(CPUOffloadPolicy, pin_memory=False)
    try:
        with mock.patch("torch.distributed.fsdp.CPUOffloadPolicy", unpinned):
            yield {
                "accelerator_config": {"use_configured_state": True},
                "fsdp": "full_shard auto_wrap",
                "fsdp_config": settings,
            }
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        AcceleratorState._reset_state()


def _deepspeed_config(stage: int, on_host: bool) -> dict[str, Any]:
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
    backend.build_shm_op = lambda: None
    automatic = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= dict.fromkeys(
            ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_max_live_parameters"), 0
        )
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if on_host:
        zero |= {"offload_optimizer": {"device": "cpu"}}
        zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    return {**automatic, "zero_optimization": zero, "bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False}


def state_of(trainer: Any) -> dict[str, Any]:
    """Return Accelerate's name of the engine that trained, the classes of the model and its weights, and more."""
    state = trainer.accelerator.state
    model = trainer.model_wrapped
    context = getattr(trainer.args.parallelism_config, "_process", None)
    parameter_classes = sorted({type(parameter).__name__ for parameter in model.parameters()})
    return {
        "distributed_type": str(state.distributed_type),
        "class": type(model).__name__,
        "parameters": parameter_classes,
        "largest local parameter": max(map(_local_numel, model.parameters())),
        "zero stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
        "on host": _is_on_host(state),
        "engine": None if context is None else str(engine_of(context, trainer.model)),
    }


def _is_on_host(state: Any) -> bool:
    """Return whether the engine's own state says that it offloads the optimizer."""
    if state.distributed_type == DistributedType.DEEPSPEED:
        return "offload_optimizer" in state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return isinstance(getattr(getattr(state, "fsdp_plugin", None), "cpu_offload", None), CPUOffloadPolicy)


def _local_numel(parameter: torch.nn.Parameter) -> int:
    """Return how many elements of a parameter this rank holds outside of a forward pass."""
    return parameter._local_tensor.numel() if hasattr(parameter, "_local_tensor") else parameter.numel()
