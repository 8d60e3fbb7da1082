"""Published runs as jobs, each predicted with nothing but its documented settings and the rates in `device`.

Where a prediction is off by more than 15 %, the run says why: from its own documents, or from arithmetic on its own
figures. Nothing here was adjusted to come closer. Settings that the source does not state are named as assumed;
buffers of attention are those of this package's transports, whatever the run used.

MFU and TFLOP/s of different papers count differently; seconds, tokens/s and bytes do not, so only these are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..text import markdown_table, wrap_prose
from .memory_estimate import memory_of
from .model_config import read_model
from .step_times import times_of
from .training_job import Job
from .training_plan import longest

TOLERANCE = 0.15


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        published: by quantity ("seconds", "tokens/s/GPU", "GB", "longest") what the source says.
        taken: bytes of a device that the source says something else takes.
        why: by quantity, why the prediction is off.
    """

    name: str
    source: str
    job: dict[str, Any]
    published: dict[str, float]
    taken: float = 0.0
    why: dict[str, str] = field(default_factory=dict)

    def build(self) -> Job:
        settings = dict(self.job)
        return Job(read_model(settings.pop("model")), **settings)


@dataclass(frozen=True)
class Comparison:
    """One published figure and its prediction."""

    run: str
    quantity: str
    published: float
    predicted: float
    why: str

    @property
    def error(self) -> float:
        """Relative to what was published."""
        return self.predicted / self.published - 1


def predict(job: Job, quantity: str, taken: float = 0.0) -> float:
    """One of the quantities that runs publish."""
    if quantity == "longest":
        return longest(job, taken)
    if quantity == "GB":
        return memory_of(job).allocated / 1e9
    times = times_of(job)
    return times.step if quantity == "seconds" else times.tokens_per_device


def comparisons() -> Iterator[Comparison]:
    """Every figure of every run."""
    for run in RUNS:
        job = run.build()
        for quantity, published in run.published.items():
            predicted = predict(job, quantity, run.taken)
            yield Comparison(run.name, quantity, published, predicted, run.why.get(quantity, ""))


def published_table() -> str:
    """All comparisons, then the reasons, then the sources."""
    found = list(comparisons())
    rows, reasons = [["run", "quantity", "published", "predicted", "error", "why"]], []
    for one in found:
        mark = ""
        if one.why:
            reasons.append(one.why) if one.why not in reasons else None
            mark = f"({reasons.index(one.why) + 1})"
        figures = [_figure(value, one.quantity) for value in (one.published, one.predicted)]
        rows.append([one.run, one.quantity, *figures, f"{100 * one.error:+.1f} %", mark])
    within = sum(abs(one.error) <= TOLERANCE for one in found)
    heading = f"{within} of {len(found)} predictions within {100 * TOLERANCE:.0f} % of what was published"
    notes = [wrap_prose(f"({n}) {reason}") for n, reason in enumerate(reasons, 1)]
    sources = [wrap_prose(f"{run.name}: {run.source}") for run in RUNS]
    return "\n\n".join((markdown_table(rows, align="llr"), heading, "\n".join(notes), "\n".join(sources)))


def _figure(value: float, quantity: str) -> str:
    if quantity == "longest":
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


_TRL = {"zero": 3, "offload": ("layers",), "loss_block": 256, "kernel": "cuda_cudnn", "transport": "allgather"}
_LARGE = {**_TRL, "offload": ("layers", "optimizer", "weights")}
_TRL_PR = (
    "pull request 6845 of TRL, table of one node with 8 x H100 and table over nodes; FSDP2, activation offload, "
    "chunked loss"
)
_LIGER = {
    "model": "Llama-3.1-8B",
    "zero": 3,
    "kernel": "flash_attn_2",
    "precision": "bf16-master",
    "offload": ("optimizer",),
}
_ALST = {**_LIGER, "fused": True, "loss_block": 4096}
_TILED = {**_ALST, "ffn_block": 4096}
_MORE = ("optimizer", "layers")
_TITAN = {"model": "Llama-3.1-8B", "zero": 3, "device": "h100-96", "kernel": "flash_attn_2", "fused": True}
_TITAN_CP = {**_TITAN, "fp8": True, "transport": "allgather"}
_EASY = {"model": "Llama-2-7b", "device": "a100", "transport": "ring", "precision": "bf16-master"}
_EASY |= {"zero": 3, "offload": ("optimizer", "weights")}  # type: ignore[dict-item]
_NEMO = {"model": "Llama-2-7b", "ulysses": 8, "transport": "ring", "kernel": "flash_attn_2"}
_NEMO |= {"checkpoint": "none", "fp8": True, "fused": True, "zero": 1}

_NOT_MEMORY = (
    "memory is probably not what limits these runs, but 32-bit offsets: hidden states of 4,096 reach 2**31 elements "
    "at 524,288 tokens a rank, and the 1-GPU file notes that 555,000 end in an illegal memory access of a Triton "
    "kernel (500,000 run; the others are at 475,000 and 484,375 a rank). That bound gives 524,288 (+5 %), 4.19M "
    "(+10 %) and 16.8M (+8 %)"
)
_STEPS = (
    "the source lists round lengths that ran, not the limit, predicted to lie below 40K; logits that somebody held "
    "until the backward pass (2 bytes of 14 a logit) would bring it to 32.4K"
)
_SDPA = (
    "the run used SDPA instead of FlashAttention-2: if that repeated key/value heads (24 KB a token with their "
    "gradients), 1.39M would fit; and the source lists round lengths that ran, not the limit"
)
_POWER = (
    "cards limited to 500 W of 700 W, with 2.4 TB/s: on the same machines, runs of 8K without context parallelism are "
    "predicted too fast, too (bf16 12.7 %); the published FA2 and GEMM rates are those of 700 W"
)
_TORCH_CP = (
    "500 W, as before, and PyTorch's ring of December 2024: with the 3.9 s of all but attention that CP 1 and CP 2 "
    "imply, attention runs at 283 TFLOP/s a GPU in both, but at 190 and 181 with CP 4 and 8, although every GPU does "
    "the same work per call; neither imbalance (CP 2 would show it) nor bytes (0.2 s a step at CP 4) explain that"
)
_FIRST_STEPS = (
    "the source averages the first five steps and says to expect variance; its own figures do not fit one another: "
    "41.1, 35.0, 56.2, 56.5 % of executed FLOPs at 64K, 128K, 512K, 700K, where 128K should lie between its "
    "neighbours. A constant of 12 s a step would explain 128K, but the whole step takes 8.4 s at 64K"
)
_TRL_4B = (
    "15.4 GB too much: 10.2 GB are two of the six tensors of MLP width that Transformers' eager MLP holds in backward "
    "(four with a fused activation); of the rest all but 0.5 if its 63.6 are GiB (68.3 GB). It states neither"
)
_TRL_GATHERED = (
    "37.8 GB too much, of which 34.4 are gradients of all keys and values in fp32: this package's all-gather holds "
    "them until they are reduced, PyTorch's passes one block of them on (`dkv_rotater`)"
)

RUNS = (
    Run(
        "TRL 1.13, Qwen3-8B, 1M, 8 x H100",
        "examples/sft_qwen3_8b_1m_context (373 s; the guide shows 380 s for the first step), release notes 1.13.0 "
        "(56.2 GB); FSDP2 with fp32 states, offloaded layer inputs, chunked loss; SDPA taken as cuDNN (at the "
        "rates of FlashAttention-2 the step would take 574 s)",
        {"model": "Qwen3-8B", "length": 2**20, **_TRL},
        {"seconds": 373.0, "GB": 56.2},
    ),
    Run(
        "TRL 1.13, Qwen3-0.6B, 1M, 8 x H100",
        "same example",
        {"model": "Qwen3-0.6B", "length": 2**20, **_TRL},
        {"seconds": 137.0, "GB": 27.9},
    ),
    Run(
        "TRL #6845, Qwen3-0.6B, 4M, 8 x H100",
        _TRL_PR,
        {"model": "Qwen3-0.6B", "length": 2**22, **_TRL},
        {"seconds": 2135.0, "GB": 73.7},
        why={"GB": _TRL_GATHERED},
    ),
    Run(
        "TRL #6845, Qwen3-8B, 1M, 8 x H100",
        _TRL_PR,
        {"model": "Qwen3-8B", "length": 2**20, **_TRL},
        {"seconds": 364.0, "GB": 56.2},
    ),
    Run(
        "TRL #6845, Qwen3-8B, 2M, 16 x H100",
        _TRL_PR,
        {"model": "Qwen3-8B", "length": 2**21, "devices": 16, **_TRL},
        {"seconds": 696.0},
    ),
    Run(
        "TRL #6845, Qwen3-8B, 4M, 32 x H100",
        _TRL_PR,
        {"model": "Qwen3-8B", "length": 2**22, "devices": 32, **_TRL},
        {"seconds": 1346.0},
    ),
    Run(
        "TRL #6845, Qwen3-30B-A3B, 1M, 8 x H100",
        "same; its guide adds fsdp_offload_params from 30B on",
        {"model": "Qwen3-30B-A3B", "length": 2**20, **_LARGE},
        {"seconds": 483.0, "GB": 46.0},
    ),
    Run(
        "TRL #6845, Qwen3-32B, 1M, 8 x H100",
        "same, and tiles of 16,384 tokens in MLPs, by which it fits",
        {"model": "Qwen3-32B", "length": 2**20, "ffn_block": 16384, **_LARGE},
        {"seconds": 1295.0, "GB": 60.8},
    ),
    Run(
        "TRL 1.13, Qwen3-4B, 1M, 4 x H100",
        "long_context_training guide",
        {"model": "Qwen3-4B", "length": 2**20, "devices": 4, **_TRL},
        {"GB": 63.6},
        why={"GB": _TRL_4B},
    ),
    Run(
        "ALST, Llama-3.1-8B, 1 x H100",
        "arXiv 2506.13996, ArcticTraining run-h100-sp1-llama-8b.yml: 500,000 tokens in 16:50",
        {**_TILED, "length": 500_000, "devices": 1, "offload": (*_MORE, "weights")},
        {"seconds": 1010.0, "longest": 500_000},
        taken=1e9,
        why={"longest": _NOT_MEMORY},
    ),
    Run(
        "ALST, Llama-3.1-8B, 8 x H100, all levers",
        "run-h100-sp8-llama-8b.yml: 3,800,000 tokens in 1:47:35 (the paper says 3.7M)",
        {**_TILED, "length": 3_800_000, "ulysses": 8, "offload": _MORE},
        {"seconds": 6455.0, "longest": 3_800_000},
        taken=5e9,
        why={"longest": _NOT_MEMORY},
    ),
    Run(
        "ALST, Llama-3.1-8B, 32 x H100, all levers",
        "run-h100-sp32-llama-8b.yml: 15,500,000 tokens in 7:25:09 (the paper says 15M)",
        {**_TILED, "length": 15_500_000, "devices": 32, "ulysses": 32, "offload": _MORE},
        {"seconds": 26709.0, "longest": 15_500_000},
        taken=5e9,
        why={"longest": _NOT_MEMORY},
    ),
    Run(
        "ALST, 8 x H100, no lever",
        "run-h100-sp8-llama-8b-no-ulysses-no-liger-no-extras.yml",
        {**_LIGER, "length": 32_000, "cp": 1},
        {"longest": 32_000},
        taken=5e9,
        why={"longest": _STEPS},
    ),
    Run(
        "ALST, 8 x H100, tiled loss",
        "...-no-ulysses-yes-liger-no-extras.yml",
        {**_ALST, "length": 160_000, "cp": 1},
        {"longest": 160_000},
        taken=5e9,
    ),
    Run(
        "ALST, 8 x H100, tiled loss, Ulysses",
        "...-no-mlp-no-act-offload.yml: 1,100,000 tokens in 9:24",
        {**_ALST, "length": 1_100_000, "ulysses": 8},
        {"seconds": 564.0, "longest": 1_100_000},
        taken=5e9,
    ),
    Run(
        "ALST, 8 x H100, and tiled MLP",
        "...-yes-mlp.yml (with SDPA): 1,200,000 tokens in 11:43",
        {**_TILED, "length": 1_200_000, "ulysses": 8},
        {"longest": 1_200_000},
        taken=5e9,
        why={"longest": _SDPA},
    ),
    Run(
        "ALST, 8 x H100, and offload instead",
        "...-yes-act-offload.yml: 2,400,000 tokens in 43:30",
        {**_ALST, "length": 2_400_000, "ulysses": 8, "offload": _MORE},
        {"seconds": 2610.0, "longest": 2_400_000},
        taken=5e9,
    ),
    Run(
        "torchtitan, Llama-3.1-8B, 8K, no CP, bf16",
        "benchmarks/llama3_h100_202412_torchtitan.md, table 1 (compile; selective checkpointing taken as saved "
        "attention)",
        {**_TITAN, "length": 8192, "cp": 1, "rows": 2, "checkpoint": "save-attention"},
        {"tokens/s/GPU": 6667.0},
    ),
    Run(
        "torchtitan, 32K, CP 1, fp8",
        "same file, table 2; H100 with 96 GB and 500 W; GB are what the allocator reserved",
        {**_TITAN_CP, "length": 2**15, "cp": 1},
        {"tokens/s/GPU": 3890.0, "GB": 83.9 * 1.0737},
        why={"tokens/s/GPU": _POWER},
    ),
    Run(
        "torchtitan, 64K, CP 2, fp8",
        "same",
        {**_TITAN_CP, "length": 2**16, "cp": 2},
        {"tokens/s/GPU": 2540.0, "GB": 84.2 * 1.0737},
        why={"tokens/s/GPU": _POWER},
    ),
    Run(
        "torchtitan, 128K, CP 4, fp8",
        "same",
        {**_TITAN_CP, "length": 2**17, "cp": 4},
        {"tokens/s/GPU": 1071.0, "GB": 84.0 * 1.0737},
        why={"tokens/s/GPU": _TORCH_CP},
    ),
    Run(
        "torchtitan, 256K, CP 8, fp8",
        "same",
        {**_TITAN_CP, "length": 2**18, "cp": 8},
        {"tokens/s/GPU": 548.0, "GB": 84.5 * 1.0737},
        why={"tokens/s/GPU": _TORCH_CP},
    ),
    Run(
        "NeMo, Llama-2-7B, 1M, 1,024 x H100",
        "performance_long_sequence.md: TP 8 x CP 32, fp8 linear layers, 536 TFLOP/s with attention counted without a "
        "causal mask = 317 tokens/s; TP taken as the same split of heads by Ulysses, FlashAttention-2 (the container "
        "is older than FlashAttention-3; cuDNN's rates would give 509) and no recomputation assumed",
        {**_NEMO, "length": 2**20, "devices": 1024, "cp": 256},
        {"tokens/s/GPU": 317.0},
    ),
    Run(
        "NeMo, Llama-2-7B, 512K, 512 x H100",
        "same: TP 8 x CP 16, 549 TFLOP/s = 635 tokens/s",
        {**_NEMO, "length": 2**19, "devices": 512, "cp": 128},
        {"tokens/s/GPU": 635.0},
    ),
    Run(
        "EasyContext, Llama-2-7B, 700K, 8 x A100",
        "README: ring attention, ZeRO-3 with offload, checkpointing, flash-attn",
        {**_EASY, "length": 700_000},
        {"tokens/s/GPU": 1603 / 8},
    ),
    Run("EasyContext, 512K", "same", {**_EASY, "length": 2**19}, {"tokens/s/GPU": 2133 / 8}),
    Run(
        "EasyContext, 128K",
        "same",
        {**_EASY, "length": 2**17},
        {"tokens/s/GPU": 4266 / 8},
        why={"tokens/s/GPU": _FIRST_STEPS},
    ),
    Run(
        "EasyContext, 64K",
        "same",
        {**_EASY, "length": 2**16},
        {"tokens/s/GPU": 7816 / 8},
        why={"tokens/s/GPU": _FIRST_STEPS},
    ),
)
