"""Optimizers by the names of the Trainer (`TrainingArguments.optim`), and how many bytes of a parameter a run keeps.

A precision says what weights and gradients are; an optimizer, how many numbers it keeps of each parameter and how many
bits each takes. States of 8 and 4 bits are stored in blocks, each with a scale in fp32 (Dettmers et al. 2021, arXiv
2110.02861; Li et al. 2023, arXiv 2309.01507); Adafactor keeps sums of rows and columns (Shazeer and Stern 2018, arXiv
1804.04235). `tests/planner/test_optimizers.py` holds the table against the Trainer's names, and against the states of
every optimizer that it can make.

Sources: Transformers' `trainer_optimizer.py` for arguments (blocks of 256 for torchao), and its Trainer for
embeddings, whose states it has bitsandbytes keep in fp32; bitsandbytes (blocks of 256 since 0.44; issue 1633 for
DTensors); torchao's `optim/adam.py`; Accelerate's `map_pytorch_optim_to_deepspeed`, which replaces what DeepSpeed
offloads.
"""

from dataclasses import dataclass

BLOCK = 256  # numbers that share a scale
SCALE = 4  # bytes


@dataclass(frozen=True)
class Precision:
    """What weights and gradients are.

    Attributes:
        weights, gradients, master: bytes of a parameter; the optimizer keeps the master weights, where there are any.
        element: bytes of a number that an optimizer keeps in the dtype of the weights it updates.
        text: in words.
    """

    weights: int
    gradients: int
    master: int
    element: int
    text: str


PRECISIONS = {
    "fp32": Precision(4, 4, 0, 4, "fp32 weights and gradients, bf16 compute (bf16: true)"),
    "bf16-master": Precision(2, 4, 4, 4, "bf16 weights, fp32 gradients and master weights (DeepSpeed)"),
    "bf16": Precision(2, 2, 0, 2, "bf16 weights, gradients and, with torch's optimizers, states (dtype: bfloat16)"),
}

_DEEPSPEED, _DEEPSPEED_OFFLOAD = "DeepSpeed", "DeepSpeed with offload"
_SHARDED = ("FSDP2", "FSDP2 with offload", _DEEPSPEED)


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        numbers: that it keeps of a parameter.
        package: that has it.
        bits: of each number; 0 for the dtype of the weights that it updates.
        factored: whether it keeps rows and columns of matrices instead.
        engines: which of those that shard parameters it works on. DDP and one process take all.
    """

    numbers: int
    package: str = "torch"
    bits: int = 0
    factored: bool = False
    engines: tuple[str, ...] = _SHARDED

    def bytes_of(self, precision: Precision) -> float:
        """Bytes of a parameter in a matrix, without master weights; 0 for a factored optimizer."""
        if not self.bits:
            return self.numbers * precision.element
        scale = SCALE / BLOCK if self.bits < 32 else 0
        return self.numbers * (self.bits / 8 + scale)

    def bytes_in_all(
        self, precision: Precision, parameters: int, embeddings: int, narrowest: int, hidden: int
    ) -> float:
        """Bytes of all states, without master weights.

        Args:
            parameters: that are trained.
            embeddings: of these in embeddings that stay whole; bitsandbytes keeps their states in fp32.
            narrowest: the shortest side of a matrix; the other is at least `hidden`. A factored optimizer keeps a row
                and a column of each, which is at most the result.
        """
        if self.factored:
            return 4 * parameters * (1 / narrowest + 1 / hidden)
        each = self.bytes_of(precision)
        if self.package == "bitsandbytes":
            return each * (parameters - embeddings) + 4 * self.numbers * embeddings
        return each * parameters


def _bitsandbytes(numbers: int, bits: int) -> Optimizer:
    return Optimizer(numbers, "bitsandbytes", bits, engines=(_DEEPSPEED,))


def _torchao(bits: int) -> Optimizer:
    return Optimizer(2, "torchao", bits)


OPTIMIZERS = {
    "adamw_torch": Optimizer(2, engines=(*_SHARDED, _DEEPSPEED_OFFLOAD)),
    "adamw_torch_fused": Optimizer(2, engines=(*_SHARDED, _DEEPSPEED_OFFLOAD)),
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
    "rmsprop": Optimizer(1),
    "adagrad": Optimizer(1),
    "adafactor": Optimizer(0, "transformers", factored=True, engines=()),
    "sgd": Optimizer(0),
}
DEFAULT = "adamw_torch_fused"  # the Trainer's
EIGHT_BIT = "adamw_torch_8bit"  # of those with 8 bits, the one for FSDP2 as well


def works_on(name: str, deepspeed: bool, offloaded: bool) -> bool:
    """Return whether an optimizer works on DeepSpeed or FSDP2, with its states in host memory or not."""
    return _name_of(deepspeed, offloaded) in OPTIMIZERS[name].engines


def check_optimizer(name: str, deepspeed: bool, offloaded: bool) -> None:
    """Check an optimizer on an engine that shards parameters.

    Raises:
        ValueError: if it has no states for parts of parameters, or none in host memory.
    """
    if works_on(name, deepspeed, offloaded):
        return
    engine = _name_of(deepspeed, offloaded)
    others = [other for other in OPTIMIZERS if works_on(other, deepspeed, offloaded)]
    if engine == _DEEPSPEED_OFFLOAD:
        cause = "Accelerate replaces every optimizer that DeepSpeed offloads by DeepSpeed's own Adam"
    elif OPTIMIZERS[name].factored:
        cause = "it takes the rows and columns of whole matrices, and ranks have parts of them"
    else:
        cause = f"{OPTIMIZERS[name].package} updates no DTensors (its issue 1633: illegal memory access)"
    raise ValueError(f"--optimizer {name} does not work on {engine}: {cause}. Choose one of {', '.join(others)}.")


def _name_of(deepspeed: bool, offloaded: bool) -> str:
    return (_DEEPSPEED if deepspeed else "FSDP2") + " with offload" * offloaded
