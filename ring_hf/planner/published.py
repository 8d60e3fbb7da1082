"""Published runs as jobs, predicted from their documented settings and published device rates alone.

Where a prediction is off by more than 15 %, the run has an explanation, from its own documents or from arithmetic on
its own figures. Nothing was adjusted to come closer. Settings that a source does not state are marked as assumed;
attention buffers are those of this package's transports, whatever the run used.

Papers define MFU and TFLOP/s differently; only seconds, tokens/s and bytes are comparable, and compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..text import markdown_table, wrap_prose
from .memory_estimate import estimate_memory
from .model_config import read_model
from .step_times import estimate_times
from .training_job import TrainingJob
from .training_plan import find_max_length

TOLERANCE = 0.15


@dataclass(frozen=True)
class PublishedRun:
    """A published run.

    Attributes:
        source: where the figures are published, and which settings are assumed.
        job: settings of the `TrainingJob`, and the name of its model.
        published: figures of the source by quantity: "seconds", "tokens/s/GPU", "GB", "longest" (tokens).
        reserved_bytes: device memory that, per the source, was used by something other than the run.
        explanations: by quantity, why the prediction is off.
    """

    name: str
    source: str
    job: dict[str, Any]
    published: dict[str, float]
    reserved_bytes: float = 0.0
    explanations: dict[str, str] = field(default_factory=dict)

    def build_job(self) -> TrainingJob:
        """Return the job of the run."""
        settings = dict(self.job)
        return TrainingJob(read_model(settings.pop("model")), **settings)


@dataclass(frozen=True)
class Comparison:
    """A published figure, its prediction, and why they differ ("" if they do not)."""

    run: str
    quantity: str
    published: float
    predicted: float
    explanation: str

    @property
    def error(self) -> float:
        """Error of the prediction relative to the published figure."""
        return self.predicted / self.published - 1


def predict_quantity(job: TrainingJob, quantity: str, reserved_bytes: float = 0.0) -> float:
    """Return the prediction of one of the quantities of `PublishedRun.published`."""
    if quantity == "longest":
        return find_max_length(job, reserved_bytes)
    if quantity == "GB":
        return estimate_memory(job).allocated / 1e9
    times = estimate_times(job)
    return times.step if quantity == "seconds" else times.tokens_per_device


def compare_runs() -> Iterator[Comparison]:
    """Yield the comparison of every figure of every run."""
    for run in RUNS:
        job = run.build_job()
        for quantity, published in run.published.items():
            predicted = predict_quantity(job, quantity, run.reserved_bytes)
            yield Comparison(run.name, quantity, published, predicted, run.explanations.get(quantity, ""))


def make_published_table() -> str:
    """Return all comparisons as a Markdown table, then the explanations, then the sources."""
    comparisons = list(compare_runs())
    rows = [["run", "quantity", "published", "predicted", "error", "note"]]
    numbers: dict[str, int] = {}  # of each explanation, from 1
    for comparison in comparisons:
        note = ""
        if comparison.explanation:
            note = f"({numbers.setdefault(comparison.explanation, len(numbers) + 1)})"
        published = _format_figure(comparison.published, comparison.quantity)
        predicted = _format_figure(comparison.predicted, comparison.quantity)
        error = f"{100 * comparison.error:+.1f} %"
        rows.append([comparison.run, comparison.quantity, published, predicted, error, note])
    num_close = sum(abs(comparison.error) <= TOLERANCE for comparison in comparisons)
    heading = f"{num_close} of {len(comparisons)} predictions within {100 * TOLERANCE:.0f} % of the published figures"
    notes = [wrap_prose(f"({number}) {explanation}") for explanation, number in numbers.items()]
    sources = [wrap_prose(f"{run.name}: {run.source}") for run in RUNS]
    return "\n\n".join((markdown_table(rows, align="llr"), heading, "\n".join(notes), "\n".join(sources)))


def _format_figure(value: float, quantity: str) -> str:
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
_OPTIMIZER_LAYERS = ("optimizer", "layers")
_TITAN = {"model": "Llama-3.1-8B", "zero": 3, "device": "h100-96", "kernel": "flash_attn_2", "fused": True}
_TITAN_CP = {**_TITAN, "fp8": True, "transport": "allgather"}
_EASY = {"model": "Llama-2-7b", "device": "a100", "transport": "ring", "precision": "bf16-master"}
_EASY |= {"zero": 3, "offload": ("optimizer", "weights")}  # type: ignore[dict-item]
_NEMO = {"model": "Llama-2-7b", "ulysses": 8, "transport": "ring", "kernel": "flash_attn_2"}
_NEMO |= {"checkpoint": "none", "fp8": True, "fused": True, "zero": 1}

_NOT_MEMORY = (
    "32-bit offsets, not memory, probably limit these runs: hidden states of 4,096 reach 2**31 elements at 524,288 "
    "tokens per rank, and the 1-GPU file notes that 555,000 end in an illegal memory access of a Triton kernel "
    "(500,000 run; the others are at 475,000 and 484,375 per rank). That bound gives 524,288 (+5 %), 4.19M (+10 %) "
    "and 16.8M (+8 %)"
)
_STEPS = (
    "the source lists round lengths that ran, not the limit, which is predicted to lie below 40K; logits that the run "
    "kept until the backward (2 bytes of 14 per logit) would bring it to 32.4K"
)
_SDPA = (
    "the run used SDPA instead of FlashAttention-2: if that repeated key/value heads (24 KB per token with their "
    "gradients), 1.39M would fit; and the source lists round lengths that ran, not the limit"
)
_POWER = (
    "GPUs limited to 500 W of 700 W, with 2.4 TB/s: on the same machines, predictions of runs at 8K without context "
    "parallelism are also too fast (bf16 12.7 %); the published FA2 and GEMM rates are those of 700 W"
)
_TORCH_CP = (
    "500 W, as before, and PyTorch's ring of December 2024: CP 1 and CP 2 imply 3.9 s for everything but attention, "
    "and attention at 283 TFLOP/s per GPU, but 190 and 181 with CP 4 and 8, although every GPU does the same work per "
    "call; neither imbalance (CP 2 would show it) nor bytes (0.2 s per step at CP 4) explain that"
)
_FIRST_STEPS = (
    "the source averages the first five steps and warns of variance; its own figures are not consistent: 41.1, 35.0, "
    "56.2, 56.5 % of executed FLOPs at 64K, 128K, 512K, 700K, where 128K should lie between its neighbours. A "
    "constant of 12 s per step would explain 128K, but the whole step takes 8.4 s at 64K"
)
_TRL_4B = (
    "15.4 GB too much: 10.2 GB are two of the six tensors of MLP width that Transformers' eager MLP holds in the "
    "backward (four with a fused activation); of the rest all but 0.5 if its 63.6 are GiB (68.3 GB). It states neither"
)
_TRL_GATHERED = (
    "37.8 GB too much, of which 34.4 are gradients of all keys and values in fp32: this package's all-gather holds "
    "them until they are reduced, PyTorch's sends on one block of them at a time (`dkv_rotater`)"
)

RUNS = (
    PublishedRun(
        "TRL 1.13, Qwen3-8B, 1M, 8 x H100",
        "examples/sft_qwen3_8b_1m_context (373 s; the guide shows 380 s for the first step), release notes 1.13.0 "
        "(56.2 GB); FSDP2 with fp32 states, offloaded layer inputs, chunked loss; SDPA assumed to be cuDNN (at the "
        "rates of FlashAttention-2 the step would take 574 s)",
        {"model": "Qwen3-8B", "length": 2**20, **_TRL},
        {"seconds": 373.0, "GB": 56.2},
    ),
    PublishedRun(
        "TRL 1.13, Qwen3-0.6B, 1M, 8 x H100",
        "same example",
        {"model": "Qwen3-0.6B", "length": 2**20, **_TRL},
        {"seconds": 137.0, "GB": 27.9},
    ),
    PublishedRun(
        "TRL #6845, Qwen3-0.6B, 4M, 8 x H100",
        _TRL_PR,
        {"model": "Qwen3-0.6B", "length": 2**22, **_TRL},
        {"seconds": 2135.0, "GB": 73.7},
        explanations={"GB": _TRL_GATHERED},
    ),
    PublishedRun(
        "TRL #6845, Qwen3-8B, 1M, 8 x H100",
        _TRL_PR,
        {"model": "Qwen3-8B", "length": 2**20, **_TRL},
        {"seconds": 364.0, "GB": 56.2},
    ),
    PublishedRun(
        "TRL #6845, Qwen3-8B, 2M, 16 x H100",
        _TRL_PR,
        {"model": "Qwen3-8B", "length": 2**21, "devices": 16, **_TRL},
        {"seconds": 696.0},
    ),
    PublishedRun(
        "TRL #6845, Qwen3-8B, 4M, 32 x H100",
        _TRL_PR,
        {"model": "Qwen3-8B", "length": 2**22, "devices": 32, **_TRL},
        {"seconds": 1346.0},
    ),
    PublishedRun(
        "TRL #6845, Qwen3-30B-A3B, 1M, 8 x H100",
        "same; its guide adds fsdp_offload_params from 30B on",
        {"model": "Qwen3-30B-A3B", "length": 2**20, **_LARGE},
        {"seconds": 483.0, "GB": 46.0},
    ),
    PublishedRun(
        "TRL #6845, Qwen3-32B, 1M, 8 x H100",
        "same, with tiles of 16,384 tokens in MLPs, which make it fit",
        {"model": "Qwen3-32B", "length": 2**20, "ffn_block": 16384, **_LARGE},
        {"seconds": 1295.0, "GB": 60.8},
    ),
    PublishedRun(
        "TRL 1.13, Qwen3-4B, 1M, 4 x H100",
        "long_context_training guide",
        {"model": "Qwen3-4B", "length": 2**20, "devices": 4, **_TRL},
        {"GB": 63.6},
        explanations={"GB": _TRL_4B},
    ),
    PublishedRun(
        "ALST, Llama-3.1-8B, 1 x H100",
        "arXiv 2506.13996, ArcticTraining run-h100-sp1-llama-8b.yml: 500,000 tokens in 16:50",
        {**_TILED, "length": 500_000, "devices": 1, "offload": (*_OPTIMIZER_LAYERS, "weights")},
        {"seconds": 1010.0, "longest": 500_000},
        reserved_bytes=1e9,
        explanations={"longest": _NOT_MEMORY},
    ),
    PublishedRun(
        "ALST, Llama-3.1-8B, 8 x H100, all options",
        "run-h100-sp8-llama-8b.yml: 3,800,000 tokens in 1:47:35 (the paper says 3.7M)",
        {**_TILED, "length": 3_800_000, "ulysses": 8, "offload": _OPTIMIZER_LAYERS},
        {"seconds": 6455.0, "longest": 3_800_000},
        reserved_bytes=5e9,
        explanations={"longest": _NOT_MEMORY},
    ),
    PublishedRun(
        "ALST, Llama-3.1-8B, 32 x H100, all options",
        "run-h100-sp32-llama-8b.yml: 15,500,000 tokens in 7:25:09 (the paper says 15M)",
        {**_TILED, "length": 15_500_000, "devices": 32, "ulysses": 32, "offload": _OPTIMIZER_LAYERS},
        {"seconds": 26709.0, "longest": 15_500_000},
        reserved_bytes=5e9,
        explanations={"longest": _NOT_MEMORY},
    ),
    PublishedRun(
        "ALST, 8 x H100, no options",
        "run-h100-sp8-llama-8b-no-ulysses-no-liger-no-extras.yml",
        {**_LIGER, "length": 32_000, "cp": 1},
        {"longest": 32_000},
        reserved_bytes=5e9,
        explanations={"longest": _STEPS},
    ),
    PublishedRun(
        "ALST, 8 x H100, tiled loss",
        "...-no-ulysses-yes-liger-no-extras.yml",
        {**_ALST, "length": 160_000, "cp": 1},
        {"longest": 160_000},
        reserved_bytes=5e9,
    ),
    PublishedRun(
        "ALST, 8 x H100, tiled loss, Ulysses",
        "...-no-mlp-no-act-offload.yml: 1,100,000 tokens in 9:24",
        {**_ALST, "length": 1_100_000, "ulysses": 8},
        {"seconds": 564.0, "longest": 1_100_000},
        reserved_bytes=5e9,
    ),
    PublishedRun(
        "ALST, 8 x H100, and tiled MLP",
        "...-yes-mlp.yml (with SDPA): 1,200,000 tokens in 11:43",
        {**_TILED, "length": 1_200_000, "ulysses": 8},
        {"longest": 1_200_000},
        reserved_bytes=5e9,
        explanations={"longest": _SDPA},
    ),
    PublishedRun(
        "ALST, 8 x H100, and offload instead",
        "...-yes-act-offload.yml: 2,400,000 tokens in 43:30",
        {**_ALST, "length": 2_400_000, "ulysses": 8, "offload": _OPTIMIZER_LAYERS},
        {"seconds": 2610.0, "longest": 2_400_000},
        reserved_bytes=5e9,
    ),
    PublishedRun(
        "torchtitan, Llama-3.1-8B, 8K, no CP, bf16",
        "benchmarks/llama3_h100_202412_torchtitan.md, table 1 (compile; selective checkpointing assumed to save "
        "attention)",
        {**_TITAN, "length": 8192, "cp": 1, "batch_size": 2, "checkpoint": "save-attention"},
        {"tokens/s/GPU": 6667.0},
    ),
    PublishedRun(
        "torchtitan, 32K, CP 1, fp8",
        "same file, table 2; H100 with 96 GB and 500 W; GB are those that the allocator reserved",
        {**_TITAN_CP, "length": 2**15, "cp": 1},
        {"tokens/s/GPU": 3890.0, "GB": 83.9 * 1.0737},
        explanations={"tokens/s/GPU": _POWER},
    ),
    PublishedRun(
        "torchtitan, 64K, CP 2, fp8",
        "same",
        {**_TITAN_CP, "length": 2**16, "cp": 2},
        {"tokens/s/GPU": 2540.0, "GB": 84.2 * 1.0737},
        explanations={"tokens/s/GPU": _POWER},
    ),
    PublishedRun(
        "torchtitan, 128K, CP 4, fp8",
        "same",
        {**_TITAN_CP, "length": 2**17, "cp": 4},
        {"tokens/s/GPU": 1071.0, "GB": 84.0 * 1.0737},
        explanations={"tokens/s/GPU": _TORCH_CP},
    ),
    PublishedRun(
        "torchtitan, 256K, CP 8, fp8",
        "same",
        {**_TITAN_CP, "length": 2**18, "cp": 8},
        {"tokens/s/GPU": 548.0, "GB": 84.5 * 1.0737},
        explanations={"tokens/s/GPU": _TORCH_CP},
    ),
    PublishedRun(
        "NeMo, Llama-2-7B, 1M, 1,024 x H100",
        "performance_long_sequence.md: TP 8 x CP 32, fp8 linear layers, 536 TFLOP/s with attention counted without a "
        "causal mask = 317 tokens/s; assumed: TP splits heads like Ulysses, FlashAttention-2 (the container is older "
        "than FlashAttention-3; cuDNN's rates would give 509), no recomputation",
        {**_NEMO, "length": 2**20, "devices": 1024, "cp": 256},
        {"tokens/s/GPU": 317.0},
    ),
    PublishedRun(
        "NeMo, Llama-2-7B, 512K, 512 x H100",
        "same: TP 8 x CP 16, 549 TFLOP/s = 635 tokens/s",
        {**_NEMO, "length": 2**19, "devices": 512, "cp": 128},
        {"tokens/s/GPU": 635.0},
    ),
    PublishedRun(
        "EasyContext, Llama-2-7B, 700K, 8 x A100",
        "README: ring attention, ZeRO-3 with offload, checkpointing, flash-attn",
        {**_EASY, "length": 700_000},
        {"tokens/s/GPU": 1603 / 8},
    ),
    PublishedRun("EasyContext, 512K", "same", {**_EASY, "length": 2**19}, {"tokens/s/GPU": 2133 / 8}),
    PublishedRun(
        "EasyContext, 128K",
        "same",
        {**_EASY, "length": 2**17},
        {"tokens/s/GPU": 4266 / 8},
        explanations={"tokens/s/GPU": _FIRST_STEPS},
    ),
    PublishedRun(
        "EasyContext, 64K",
        "same",
        {**_EASY, "length": 2**16},
        {"tokens/s/GPU": 7816 / 8},
        explanations={"tokens/s/GPU": _FIRST_STEPS},
    ),
)
