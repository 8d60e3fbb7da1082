"""Optimizers by the names of the Trainer (`TrainingArguments.optim`), and the bytes of a parameter that each keeps.

A precision gives the dtypes of weights and gradients; an optimizer gives the numbers it keeps per parameter, and their
bits. States of 8 and 4 bits are stored in blocks, each with a scale in fp32 (Dettmers et al. 2021, arXiv 2110.02861;
Li et al. 2023, arXiv 2309.01507); Adafactor keeps sums of rows and columns (Shazeer and Stern 2018, arXiv 1804.04235).
`tests/planner/test_optimizers.py` compares the table with the Trainer's names, and with the states of every optimizer
that it can create.

Sources: Transformers' `trainer_optimizer.py` for arguments (blocks of 256 for torchao), and its Trainer for
embeddings, whose states it has bitsandbytes keep in fp32; bitsandbytes (blocks of 256 since 0.44; issue 1633 for
DTensors); torchao's `optim/adam.py`; Accelerate's `map_pytorch_optim_to_deepspeed`, which replaces the optimizers that
DeepSpeed offloads.
"""

from dataclasses import dataclass

BLOCK_SIZE = 256  # numbers that share a scale
SCALE_BYTES = 4


@dataclass(frozen=True)
class PrecisionSpec:
    """Dtypes of weights and gradients.

    Attributes:
        weights, gradients, master: bytes per parameter; master weights, if there are any, belong to the optimizer.
        element: bytes of a number that an optimizer keeps in the dtype of the weights it updates.
        text: the same in words.
    """

    weights: int
    gradients: int
    master: int
    element: int
    text: str


PRECISIONS = {
    "fp32": PrecisionSpec(4, 4, 0, 4, "fp32 weights and gradients, bf16 compute (bf16: true)"),
    "bf16-master": PrecisionSpec(2, 4, 4, 4, "bf16 weights, fp32 gradients and master weights (DeepSpeed)"),
    "bf16": PrecisionSpec(
        2, 2, 0, 2, "bf16 weights, gradients and, with torch's optimizers, states (dtype: bfloat16)"
    ),
}

_DEEPSPEED, _DEEPSPEED_OFFLOAD = "DeepSpeed", "DeepSpeed with offload"
_FSDP2, _FSDP2_OFFLOAD = "FSDP2", "FSDP2 with offload"
_SHARDING_ENGINES = (_FSDP2, _FSDP2_OFFLOAD, _DEEPSPEED)


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer.

    Attributes:
        num_states: numbers that it keeps per parameter.
        package: the package that implements it.
        bits: bits of each number; 0 for the dtype of the weights that it updates.
        is_factored: whether it keeps rows and columns of matrices instead.
        engines: the engines that shard parameters on which it works. It works on DDP and in one process anyway.
    """

    num_states: int
    package: str = "torch"
    bits: int = 0
    is_factored: bool = False
    engines: tuple[str, ...] = _SHARDING_ENGINES

    def bytes_per_parameter(self, precision: PrecisionSpec) -> float:
        """Return the bytes of states per parameter in a matrix, without master weights; 0 for a factored optimizer."""
        if not self.bits:
            return self.num_states * precision.element
        scale = SCALE_BYTES / BLOCK_SIZE if self.bits < 32 else 0
        return self.num_states * (self.bits / 8 + scale)

    def total_bytes(
        self, precision: PrecisionSpec, parameters: int, embeddings: int, shortest_side: int, hidden: int
    ) -> float:
        """Return the bytes of all states, without master weights.

        Args:
            parameters: number of trained parameters.
            embeddings: how many of these are in whole embeddings, whose states bitsandbytes keeps in fp32.
            shortest_side: shortest side of all matrices; the other is at least `hidden`. A factored optimizer keeps a
                row and a column of each, which is at most the result.
        """
        if self.is_factored:
            return 4 * parameters * (1 / shortest_side + 1 / hidden)
        per_parameter = self.bytes_per_parameter(precision)
        if self.package == "bitsandbytes":
            return per_parameter * (parameters - embeddings) + 4 * self.num_states * embeddings
        return per_parameter * parameters


def _bitsandbytes(num_states: int, bits: int) -> OptimizerSpec:
    return OptimizerSpec(num_states, "bitsandbytes", bits, engines=(_DEEPSPEED,))


def _torchao(bits: int) -> OptimizerSpec:
    return OptimizerSpec(2, "torchao", bits)


OPTIMIZERS = {
    "adamw_torch": OptimizerSpec(2, engines=(*_SHARDING_ENGINES, _DEEPSPEED_OFFLOAD)),
    "adamw_torch_fused": OptimizerSpec(2, engines=(*_SHARDING_ENGINES, _DEEPSPEED_OFFLOAD)),
    "adamw_torch_8bit": _torchao(8),
    "adamw_torch_4bit": _torchao(4),
    "adamw_bnb_8bit": _bitsandbytes(2, 8),
    "adamw_8bit": _bitsandbytes(2, 8),
    "paged_adamw_8bit": _bitsandbytes(2, 8),
    "paged_adamw_32bit": _bitsandbytes(2, 32),
    "lion_8bit": _bitsandbytes(1, 8),
    "lion_32bit": _bitsandbytes(1, 32),
    "paged_lion_8bit": _bitsandbytes(1, 8),
    "paged_lion_32bit": _bitsandbytes(1, 32),
    "ademamix_8bit": _bitsandbytes(3, 8),
    "ademamix": _bitsandbytes(3, 32),
    "paged_ademamix_8bit": _bitsandbytes(3, 8),
    "paged_ademamix_32bit": _bitsandbytes(3, 32),
    "rmsprop_bnb_8bit": _bitsandbytes(1, 8),
    "rmsprop_bnb_32bit": _bitsandbytes(1, 32),
    "rmsprop_bnb": _bitsandbytes(1, 32),
    "rmsprop": OptimizerSpec(1),
    "adagrad": OptimizerSpec(1),
    "adafactor": OptimizerSpec(0, "transformers", is_factored=True, engines=()),
    "sgd": OptimizerSpec(0),
}
DEFAULT_OPTIMIZER = "adamw_torch_fused"  # the Trainer's
EIGHT_BIT_OPTIMIZER = "adamw_torch_8bit"  # the 8-bit optimizer that also works on FSDP2


def supports_engine(name: str, deepspeed: bool, offloaded: bool) -> bool:
    """Return whether an optimizer works on DeepSpeed (or FSDP2), with its states in host memory (or not)."""
    return _engine_name(deepspeed, offloaded) in OPTIMIZERS[name].engines


def check_optimizer(name: str, deepspeed: bool, offloaded: bool) -> None:
    """Check an optimizer on an engine that shards parameters.

    Raises:
        ValueError: if the optimizer cannot update shards of parameters, or not in host memory.
    """
    if supports_engine(name, deepspeed, offloaded):
        return
    engine = _engine_name(deepspeed, offloaded)
    alternatives = [other for other in OPTIMIZERS if supports_engine(other, deepspeed, offloaded)]
    if engine == _DEEPSPEED_OFFLOAD:
        cause = "Accelerate replaces every optimizer that DeepSpeed offloads by DeepSpeed's own Adam"
    elif OPTIMIZERS[name].is_factored:
        cause = "it needs the rows and columns of whole matrices, and each rank has only a shard of them"
    else:
        cause = f"{OPTIMIZERS[name].package} does not support DTensors (its issue 1633: illegal memory access)"
    raise ValueError(
        f"--optimizer {name} does not work on {engine}: {cause}. Choose one of {', '.join(alternatives)}."
    )


def _engine_name(deepspeed: bool, offloaded: bool) -> str:
    if deepspeed:
        return _DEEPSPEED_OFFLOAD if offloaded else _DEEPSPEED
    return _FSDP2_OFFLOAD if offloaded else _FSDP2
