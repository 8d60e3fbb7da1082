"""`ContextParallelConfig`: the value of `TrainingArguments(parallelism_config=...)`.

It is a subclass of Accelerate's `ParallelismConfig` whose device mesh has an axis `cp`, so that the ranks of a group
read the same examples. The inherited `cp_size` stays 1: otherwise the Trainer would divide the token count by it, and
Accelerate would enable torch's own context parallelism. Fields that are not set are read from environment variables
(`RING_HF_CONTEXT_PARALLEL_SIZE`, ...), so that one launch line can hold them. `Accelerator.__init__` calls
`build_device_mesh` and then `_validate_accelerator`; by then the processes and the engine (`engines.py`) are known,
and everything else is set up.
"""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from transformers import trainer as transformers_trainer

from ring_hf.geometry import RingOptions
from ring_hf.kernels import check_name
from ring_hf.parallel import register_group

from .. import context
from . import exact_evaluation
from .callback import ContextParallelCallback
from .engines import ENGINES, Engine, check_engine, find_engine
from .exact_evaluation import Evaluator
from .model_guard import guard_prepared_models
from .whole_checkpoints import take_whole_checkpoints

OPTIONS: dict[str, Any] = {option.name: option.default for option in fields(RingOptions)}
DEFAULTS: dict[str, Any] = {"context_parallel_size": 1, **OPTIONS, "verify": False}
DATA_PARALLEL = ("dp_replicate_size", "dp_shard_size")
INHERITED = ("cp_size", "sp_size", "tp_size")
# The environment variables that the `parallelism_config` of an accelerate file becomes.
FROM_ACCELERATE = {
    "context_parallel_size": "PARALLELISM_CONFIG_CP_SIZE",
    "dp_replicate_size": "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
    "dp_shard_size": "PARALLELISM_CONFIG_DP_SHARD_SIZE",
}
SIZE_VARIABLES = ("RING_HF_CONTEXT_PARALLEL_SIZE", FROM_ACCELERATE["context_parallel_size"])


class PlainSettings(dict[str, Any]):
    """A config as plain values. Accelerate can print it, and is told so if it is to train with it.

    `TrainingArguments.to_dict` makes one of the config. TRL's SFTTrainer builds an `SFTConfig` of that dict when it is
    given other arguments.
    """

    def get_device_mesh(self, device_type: str | None = None) -> Any:
        """Refuse, where Accelerate begins to use a config.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"parallelism_config became a dict, {dict(self)}: these training arguments were built from the to_dict() "
            "of others, as TRL's trainers do with arguments that are no config of theirs. Pass the arguments that the "
            "Trainer asks for (an SFTConfig to SFTTrainer) with parallelism_config=ring_hf.ContextParallelConfig(...)."
        )


@dataclass(repr=False)
class ContextParallelConfig(ParallelismConfig):
    """How many ranks share each sequence, and by which algorithm.

    Args:
        context_parallel_size: ranks that share each sequence.
        ulysses_size: how many of them exchange heads for tokens, neighbours first; the rest is a ring of such groups.
            "auto" takes the most that the heads of the model allow inside a node. Default: 1, or all of them if the
            model attends with "ulysses".
        inner_ring_size: ranks of the inner rings (inside a node) of a double ring; must divide the ring.
        head_chunks: with Ulysses, in how many chunks a rank's heads are exchanged and attended with, one after the
            other: attention needs less memory, and backward exchanges more (docs/head_chunks.md).
        transport: how keys and values travel: a name from `ring_hf.geometry.TRANSPORTS`; "auto" chooses by cost.
        kernel: attention kernel: "auto", or a name from `ring_hf.kernels.KERNELS` or `FAMILIES`.
        overlap: exchange the next keys and values while computing with the present ones.
        verify: compare a few tokens of the first batch, sharded and whole, before the first step of every training.
            Default: only for models and Trainers that are not proven by name.
        dp_replicate_size: copies of the weights. Default: 1 under FSDP2 (more is HSDP); under other engines the number
            of processes / context_parallel_size.
        dp_shard_size: under FSDP2, the groups of ranks that read different sequences and share one copy of the
            weights, which is cut over dp_shard_size * context_parallel_size ranks. Default: as many as there are. FSDP
            version 1 and ZeRO cut over all ranks by themselves.
    """

    dp_replicate_size: int | None = None
    dp_shard_size: int | None = None
    context_parallel_size: int | None = None
    ulysses_size: int | str | None = None
    inner_ring_size: int | None = None
    head_chunks: int | None = None
    transport: str | None = None
    kernel: str | None = None
    overlap: bool | None = None
    verify: bool | None = None
    _requested: tuple[int | None, int | None] = field(default=(None, None), init=False, repr=False)
    _size_is_given: bool = field(default=False, init=False, repr=False)
    _process: context.ProcessContext | None = field(default=None, init=False, repr=False)
    _evaluator: Evaluator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in INHERITED:
            size = getattr(self, name)
            if size not in (None, 1):
                raise ValueError(
                    f"{name}={size} would make the Trainer divide its token count by it, or start Accelerate's own "
                    f"parallelism. Leave it at 1 and set context_parallel_size={size}."
                )
            setattr(self, name, 1)
        for name in ("tp_size", "sp_size"):
            variable = f"PARALLELISM_CONFIG_{name.upper()}"
            if os.environ.get(variable, "1") != "1":
                raise ValueError(
                    f"{variable}={os.environ[variable]} (the parallelism_config of an accelerate file sets it) is not "
                    "supported together with context parallelism. Set it to 1 or leave it out."
                )
        for name in ("tp_handler", "cp_handler", "sp_handler"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} configures Accelerate's own parallelism, which is off here. Leave it out.")
        self._size_is_given = self.context_parallel_size is not None or any(
            name in os.environ for name in SIZE_VARIABLES
        )
        for name, default in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, _from_environment(name, default))
        for name in DATA_PARALLEL:
            if getattr(self, name) is None:
                setattr(self, name, _from_environment(name, None))
        self._requested = self.dp_replicate_size, self.dp_shard_size
        self.dp_replicate_size = 1 if self.dp_replicate_size is None else self.dp_replicate_size
        self.dp_shard_size = 1 if self.dp_shard_size is None else self.dp_shard_size
        self._refuse_unsupported()
        super().__post_init__()
        self._sizes["cp"] = self.context_parallel_size

    def _refuse_unsupported(self) -> None:
        for name in (*(name for name in DEFAULTS if name.endswith(("_size", "_chunks"))), *DATA_PARALLEL):
            size = getattr(self, name)
            if name == "ulysses_size" and (size is None or isinstance(size, str)):
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1.")
        check_name(self.options.kernel)
        self.options.check_size(self._size)

    @property
    def options(self) -> RingOptions:
        """The algorithm; what depends on the model is resolved later (`degrees.py`)."""
        return RingOptions(**{name: getattr(self, name) for name in OPTIONS})

    # Accelerate reads these. `cp_enabled` stays False (cp_size is 1), so they tell it about the axis.
    @property
    def active_mesh_dims(self) -> list[str]:
        return self.dp_dim_names + (["cp"] if self._size > 1 else [])

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """The axes over which FSDP2 shards weights, including the ranks that share a sequence."""
        return [name for name in self.active_mesh_dims if name != "dp_replicate"]

    @property
    def dp_cp_dim_names(self) -> list[str]:
        return self.active_mesh_dims

    @property
    def total_size(self) -> int:
        return self._replicas * self._size

    @property
    def _replicas(self) -> int:
        """The number of groups of ranks that read different sequences."""
        return (self.dp_replicate_size or 1) * (self.dp_shard_size or 1)

    @property
    def _size(self) -> int:
        return self.context_parallel_size or 1

    def __repr__(self) -> str:
        names = [*DEFAULTS, *DATA_PARALLEL]
        return f"ContextParallelConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in sorted(names))})"

    def to_json(self) -> dict[str, Any]:
        """Plain values for trackers and `TrainingArguments.to_dict`."""
        return PlainSettings({name: getattr(self, name) for name in (*DEFAULTS, *DATA_PARALLEL)})

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings without the process groups of the device mesh, for `training_args.bin`."""
        bound = ("device_mesh", "_process", "_evaluator")
        return {key: value for key, value in self.__dict__.items() if key not in bound}

    def build_device_mesh(self, device_type: str) -> Any:
        """Return a mesh of the axes larger than 1, in the order (dp_replicate, dp_shard, cp): ranks that share a
        sequence are neighbours."""
        running = find_engine(AcceleratorState()) if AcceleratorState._shared_state else ENGINES["DDP"]
        self._fit(PartialState().num_processes, running)
        if self.total_size == 1:
            return None
        return super().build_device_mesh(device_type)

    def _fit(self, num_processes: int, engine: Engine) -> None:
        """Infer the sizes that are left open.

        Raises:
            ValueError: if the sizes do not make up the number of processes.
        """
        size = self._size
        if num_processes > 1 and not self._size_is_given:
            raise ValueError(
                f"{num_processes} processes were started, but nothing says how many of them share a sequence: "
                f"context_parallel_size was not passed, and {SIZE_VARIABLES[0]} is not set. Pass "
                f"context_parallel_size={num_processes}, or 1 if plain data parallelism is meant."
            )
        if num_processes % size:
            divisors = [n for n in range(1, num_processes + 1) if num_processes % n == 0]
            raise ValueError(
                f"context_parallel_size={size} does not divide {num_processes} processes. Set it to "
                f"{' or '.join(map(str, divisors))}, or start {size}, {size * 2} or {size * 3} processes."
            )
        groups = num_processes // size
        replicate, shard = self._requested
        if engine.cuts_over_mesh:
            replicate = 1 if replicate is None else replicate
            shard = max(groups // replicate, 1) if shard is None else shard
        else:
            replicate = groups if replicate is None else replicate
            shard = 1 if shard is None else shard
            if shard > 1:
                raise ValueError(
                    f"dp_shard_size={shard} cuts weights over the device mesh, which FSDP2 does, but {engine} runs "
                    "here. Leave it out, or start with `accelerate launch --use_fsdp --fsdp_version 2`."
                )
        self.dp_replicate_size, self.dp_shard_size = replicate, shard
        self._set_size("dp_replicate", replicate)
        self._set_size("dp_shard", shard)
        if self.total_size != num_processes:
            sizes = f"dp_replicate_size={replicate}" + (f" * dp_shard_size={shard}" if engine.cuts_over_mesh else "")
            way_out = (
                f"dp_replicate_size={groups}" if not engine.cuts_over_mesh else f"sizes whose product is {groups}"
            )
            raise ValueError(
                f"context_parallel_size={size} * {sizes} = {self.total_size}, but {num_processes} processes were "
                f"started. Set {way_out}, leave them out, or start {self.total_size} processes."
            )
        if engine.cuts_over_mesh and num_processes > 1 and shard * size == 1:
            raise ValueError(
                f"dp_replicate_size={replicate} with dp_shard_size=1 and context_parallel_size=1 leaves no ranks over "
                f"which {engine} could cut the weights. Leave dp_replicate_size out, or use DDP."
            )

    def _validate_accelerator(self, accelerator: Any) -> None:
        error = check_engine(accelerator)
        if error is not None:
            raise ValueError(error)
        engine = find_engine(accelerator.state)
        self._fit(accelerator.num_processes, engine)
        engine.adapt(accelerator.state, self._size)
        self._bind(accelerator, engine)
        self._install(accelerator)

    def _bind(self, accelerator: Any, engine: Engine) -> None:
        """Create the process context: which shard of a sequence, and which sequences, this process reads."""
        if self._size == 1:
            return
        mesh = self.device_mesh
        replicas = mesh["dp"] if self._replicas > 1 else None
        self._process = context.ProcessContext(
            size=self._size,
            rank=mesh["cp"].get_local_rank(),
            num_replicas=self._replicas,
            replica=0 if replicas is None else replicas.get_local_rank(),
            group=register_group(mesh["cp"].get_group()),
            replica_group=None if replicas is None else register_group(replicas.get_group()),
            options=self.options,
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)),
            verify=bool(self.verify),
            engine=engine.name,
        )

    def _install(self, accelerator: Any) -> None:
        """Add our callback to all Trainers of this process, and our methods to this accelerator."""
        if ContextParallelCallback not in transformers_trainer.DEFAULT_CALLBACKS:
            transformers_trainer.DEFAULT_CALLBACKS.append(ContextParallelCallback)
        take_whole_checkpoints()
        if self._process is not None:
            self._evaluator = Evaluator(self._process)
            self._evaluator.install(accelerator)
            guard_prepared_models(accelerator)
        self.activate()

    def activate(self) -> None:
        """Activate the context of this config; the callback repeats it when several Trainers take turns."""
        context.activate(self._process)
        exact_evaluation.activate(self._evaluator)


def _from_environment(name: str, default: Any) -> Any:
    """Return a setting of the launch line; sizes also from the `parallelism_config` of an accelerate YAML."""
    variable = f"RING_HF_{name.upper()}"
    if name in FROM_ACCELERATE and variable not in os.environ:
        variable = FROM_ACCELERATE[name]
        if name in DATA_PARALLEL and os.environ.get(variable) == "1":
            return default  # Accelerate's launcher always sets it
    text = os.environ.get(variable)
    if text is None or (name == "ulysses_size" and text == "auto"):
        return default if text is None else text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{variable}={text!r} must be true or false.")
        return text.lower() in ("true", "1")
    if default is None or isinstance(default, int):
        if not text.isdigit():
            way_out = ' or "auto"' if name == "ulysses_size" else ""
            raise ValueError(f"{variable}={text!r} must be a whole number{way_out}.")
        return int(text)
    return text
