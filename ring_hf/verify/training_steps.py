"""Training steps of a model on one device: tokens/s, MFU and peak memory beside what the planner predicts for them.

The model has the shape of Qwen3-0.6B (the planner's table) and random weights, the Trainer is unmodified and runs in
bf16. At each length it trains with PyTorch's `sdpa`, with `ring_zigzag` in one process, and with `ring_hf.memory` on
top; then there is one rank's share of a ring of 8 (`ring_share`). Before each run, the planner decides

    with which settings   the first of a variant's that fit the device
    whether it starts     not if it would need far more memory than there is, or more time than the section has left

A run that was too large in spite of the plan is a result, "out of memory". MFU counts the FLOPs of the model,
causal and without recomputation, over the device's dense peak in bf16.

`agreement` shows that the timed runs are the same training: in short steps, `ring_zigzag` with and without memory
options may differ from fp32 at most twice as much as `sdpa` in bf16; so may timed runs at the shortest length.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import memory
from ..costmodel.devices import DEVICES
from ..memory.chunked_loss import automatic_block
from ..planner import Model, TrainingJob, TrainingPlan, plan, read_config
from ..planner.memory_estimate import MemoryEstimate
from ..planner.model_config import parse_config
from ..planner.step_times import estimate_passes
from . import ring_share
from .trainer_run import Run, free, make_model, train
from .trajectories import HALF, STEPS, deviation

MODEL = "Qwen/Qwen3-0.6B"
LENGTHS = tuple(n * 1024 for n in (32, 64, 128, 256))
RANKS, RANK, RING_LENGTH = 8, 4, 128 * 1024  # of the ring; in zigzag all ranks have the same work
AGREEMENT = 2048  # tokens: few, as PyTorch has no flash attention in fp32
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 128, "vocab_size": 512, "head_dim": 16}
BUDGET = {"gpu": 200.0, "emulated": math.inf}  # seconds that the runs of one call may take
TIMED = 15.0  # seconds of timed steps of a run: as many as fit, from one to three
SETUP = 5.0  # seconds of a run besides its steps, assumed
MAX_MEMORY_RATIO = 1.25  # a run starts up to this multiple of the device's memory, as the planner estimates it
# Results of `torch._fused_sdp_choice`, and the planner's name of a kernel whose published rate applies.
SDPA = {0: "sdpa math", 1: "sdpa flash", 2: "sdpa efficient", 3: "sdpa cudnn"}
RATES = {"sdpa flash": "flash_attn_2", "cuda_flash": "flash_attn_2", "sdpa cudnn": "cuda_cudnn"}
# Parts of a plan that do not exist when a rank's share runs alone.
EXCHANGE_PARTS = (
    "exposed attention communication",
    "exposed weight communication",
    "gradient buckets (DDP)",
    "idle exchange buffers",
)


@dataclass(frozen=True)
class Scenario:
    """Settings of a run.

    Attributes:
        job: for the planner.
        recompute: the Trainer's gradient checkpointing.
        options: of `ring_hf.memory.apply`; None for an unchanged model.
    """

    name: str
    job: Mapping[str, Any]
    recompute: bool = False
    options: Mapping[str, Any] | None = None


BLOCKS = {"ffn_block": "auto", "loss_block": "auto"}
PLAIN = Scenario("off", {"checkpoint": "none"})
RECOMPUTE = Scenario("gradient checkpointing", {"checkpoint": "full"}, recompute=True)
SAVE = Scenario("save, blocks", {"checkpoint": "save-attention"}, options={"attention": "save", **BLOCKS})
OFFLOAD = Scenario(
    "save, blocks, offload",
    {"checkpoint": "save-attention", "offload": ("layers", "attention")},
    options={"attention": "save", "offload": "all", **BLOCKS},
)
# "save" would keep the attention of every tile: a ring is one operator, an emulated rank is not.
SHARE = Scenario("recompute, blocks", {"checkpoint": "full"}, options={"attention": "recompute", **BLOCKS})
# Attention, and scenarios of which the first that fits runs.
VARIANTS = {
    "sdpa": ("sdpa", (PLAIN, RECOMPUTE)),
    "ring_zigzag": ("ring_zigzag", (PLAIN, RECOMPUTE)),
    "ring_zigzag, memory options": ("ring_zigzag", (SAVE, OFFLOAD)),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One result of the section.

    Attributes:
        seconds: that it is expected to take.
        measure: returns the row.
        plan: of its training job, if it is one.
    """

    name: str
    seconds: float
    measure: Callable[[], Row]
    plan: TrainingPlan | None = None


@dataclass
class Bench:
    """The device, the model, and their plans.

    Attributes:
        planned_for: the planner's name of the device.
        kernel: PyTorch's choice, which `sdpa` and `ring_zigzag` in one process both get.
        share_kernel: of one rank's share.
    """

    device: torch.device
    planned_for: str
    tiny: bool
    quick: bool
    keys: Mapping[str, Any] = field(init=False)
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        keys, name, source = read_config(MODEL)
        self.keys = {**keys, **TINY} if self.tiny else keys
        self.model = parse_config(self.keys, name, source)
        one_layer = {**self.keys, "num_hidden_layers": 1, "vocab_size": 256}
        applied = memory.apply(
            make_model(Run(one_layer, "sdpa", (256,)), torch.device("cpu")), attention="none", loss_block=None
        )
        (self._ffn_block,) = applied.feed_forward.values()
        self.kernel = self._sdpa_kernel()
        self.share_kernel = ring_share.kernel_name(self.model, self.device)

    def _sdpa_kernel(self) -> str:
        model, shape = self.model, (2048, self.model.head_dim)
        q, k = (
            torch.zeros(1, n, *shape, device=self.device, dtype=torch.bfloat16) for n in (model.heads, model.kv_heads)
        )
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True)
        return SDPA.get(choice, f"sdpa {choice}")

    @property
    def lengths(self) -> tuple[int, ...]:
        lengths = (64, 128) if self.tiny else LENGTHS
        return lengths[::2] if self.quick else lengths

    @property
    def ring_length(self) -> int:
        return 128 if self.tiny else RING_LENGTH

    def plan(self, scenario: Scenario, length: int, ranks: int = 1) -> TrainingPlan:
        """Return the plan of a job, with the blocks that "auto" selects and the rate of the kernel that will run."""
        kernel = self.kernel if ranks == 1 else self.share_kernel
        rate = RATES.get(kernel, kernel)
        blocks: dict[str, Any] = {}
        if scenario.options is not None:
            loss_block = automatic_block(length // ranks, self.model.hidden, self.model.vocab)
            blocks = {"ffn_block": self._ffn_block, "loss_block": loss_block}
        return plan(
            TrainingJob(
                self.model,
                length,
                devices=ranks,
                device=self.planned_for,
                kernel=rate if rate in DEVICES[self.planned_for].kernels else "auto",
                transport=ring_share.TRANSPORT,
                layout=ring_share.LAYOUT,
                **scenario.job,
                **blocks,
            )
        )


def planner_device(name: str, num_bytes: int) -> str | None:
    """Return the planner's name of a GPU: of those with its name the nearest in memory; None if it knows none.

    >>> planner_device("NVIDIA H100 80GB HBM3", 85e9), planner_device("NVIDIA GH200 480GB", 102e9)
    ('h100', None)
    """
    parts = re.split(r"[^A-Za-z0-9]+", name)
    same = {key: device.memory for key, device in DEVICES.items() if device.name.split()[0] in parts}
    return min(same, key=lambda key: abs(same[key] - num_bytes)) if same else None


def cases(bench: Bench) -> Iterator[Case]:
    """Yield all results of the section: everything short, memory options at all lengths, then their comparison."""
    shortest, *longer = bench.lengths
    *others, last = VARIANTS
    yield Case("agreement", 4 * SETUP, lambda: agreement(bench))
    yield from (_whole_case(bench, name, shortest) for name in VARIANTS)
    yield from _share_cases(bench)
    yield from (_whole_case(bench, last, length) for length in longer)
    yield from (_whole_case(bench, name, length) for length in longer for name in others)


def _whole_case(bench: Bench, name: str, length: int) -> Case:
    attention, settings = VARIANTS[name]
    plans = [(scenario, bench.plan(scenario, length)) for scenario in settings]
    scenario, planned = next((pair for pair in plans if pair[1].fits), plans[-1])
    lengths = schedule(length, bench.plan(SAVE, length).times.step)  # the same for all variants
    run = Run(bench.keys, attention, lengths, scenario.options, scenario.recompute)
    return _steps_case(f"{name}, {length:,} tokens", bench, run, scenario, planned)


def _share_cases(bench: Bench) -> Iterator[Case]:
    length = bench.ring_length
    planned = bench.plan(SHARE, length, RANKS)
    alone = _without_exchange(planned)
    name = f"one rank of {RANKS}"
    yield Case(
        f"{name}, one layer's attention, {length:,} tokens",
        SETUP,
        lambda: _attention_row(bench, length, planned),
    )
    local = length // RANKS
    lengths = schedule(local, sum(alone["parts"].values()), whole_warm_up=True)
    positions = ring_share.positions(length, RANKS, RANK)
    run = Run(bench.keys, ring_share.ATTENTION, lengths, SHARE.options, positions=positions)
    yield _steps_case(f"{name}, {length:,} tokens", bench, run, SHARE, planned)


def schedule(length: int, seconds: float, whole_warm_up: bool = False) -> tuple[int, ...]:
    """Return the tokens of each step: a warm-up, then one to three timed steps; an eighth warms up for a single one.

    Args:
        seconds: that one step is expected to take.
    """
    timed = max(1, min(3, int(TIMED // seconds)))
    return (length if timed > 1 or whole_warm_up else length // 8, *[length] * timed)


def _without_exchange(planned: TrainingPlan) -> Row:
    """Return the parts of a step in seconds and the memory in bytes of a plan, without the exchange."""
    parts = {part.name: part.seconds for part in planned.times.parts if part.name not in EXCHANGE_PARTS}
    items = tuple(item for item in planned.memory.items if item.name not in EXCHANGE_PARTS)
    return {"parts": parts, "memory": MemoryEstimate(items).allocated}


def _steps_case(name: str, bench: Bench, run: Run, scenario: Scenario, planned: TrainingPlan) -> Case:
    shared = planned.job.cp > 1
    alone = _without_exchange(planned)
    predicted = {"seconds": sum(alone["parts"].values()), "memory": alone["memory"]}
    kernel = bench.share_kernel if shared else bench.kernel
    about: Row = {"kind": "steps", "attention": run.attention, "setting": scenario.name, "kernel": kernel}
    about |= {"tokens": planned.job.length, "ranks": planned.job.cp, "lengths": list(run.lengths)}
    about |= {"predicted": predicted, "fits": planned.fits}

    def measure() -> Row:
        if shared:
            ring_share.register(planned.job.length, planned.job.cp, RANK)
        steps = train(run, bench.device)
        seconds = statistics.median(steps.seconds[1:])
        flops = planned.times.flops.model / planned.job.devices
        measured = {"seconds": seconds, "memory": steps.memory}
        return {
            **about,
            **measured,
            "all_seconds": steps.seconds,
            "tokens_per_second": run.lengths[-1] / seconds,
            "mfu": flops / seconds / DEVICES[bench.planned_for].peak,
            "ratio": {key: measured[key] / predicted[key] for key in measured},
            **steps.curves,
        }

    warm_up = (run.lengths[0] / run.lengths[-1]) ** 2
    seconds = SETUP + (len(run.lengths) - 1 + warm_up) * predicted["seconds"]
    return Case(name, seconds, lambda: _or_out_of_memory(measure, about), planned)


def _or_out_of_memory(measure: Callable[[], Row], about: Row) -> Row:
    """Return the row, or `about` with the outcome "out of memory"."""
    try:
        return {**measure(), "outcome": "ran"}
    except torch.OutOfMemoryError:
        return {**about, "outcome": "out of memory"}


def _attention_row(bench: Bench, length: int, planned: TrainingPlan) -> Row:
    times = ring_share.time_attention(bench.model, length, RANKS, RANK, bench.device, repeats=3)
    costs = dict(zip(("forward", "backward"), estimate_passes(planned.job, None), strict=True))
    row: Row = {"kind": "attention", "kernel": bench.share_kernel, "tokens": length, "ranks": RANKS, "rank": RANK}
    for (name, cost), flops in zip(costs.items(), times.pop("flops"), strict=True):
        seconds = statistics.median(times[name])
        row[name] = {"seconds": seconds, "all_seconds": times[name], "tflops": flops / seconds / 1e12}
        row[name] |= {"predicted": cost.compute, "ratio": seconds / cost.compute}
    return {**row, "outcome": "ran"}


def agreement(bench: Bench) -> Row:
    """Train each variant in short steps; return differences from `sdpa` in fp32, and twice those of `sdpa` in bf16."""
    length = 64 if bench.tiny else AGREEMENT
    lengths = (length,) * STEPS

    def curves(attention: str, scenario: Scenario, bf16: bool = True) -> dict[str, list[float]]:
        run = Run(bench.keys, attention, lengths, scenario.options, scenario.recompute, bf16)
        steps = train(run, bench.device)
        free(bench.device)
        return steps.curves

    plain = curves("sdpa", RECOMPUTE, bf16=False)
    allowed = {name: HALF * value for name, value in deviation(curves("sdpa", RECOMPUTE), plain).items()}
    pairs = {"ring_zigzag": RECOMPUTE, "ring_zigzag, memory options": SAVE}
    rows = {name: deviation(curves("ring_zigzag", scenario), plain) for name, scenario in pairs.items()}
    return {"kind": "agreement", "tokens": length, "steps": STEPS, "allowed": allowed, "rows": rows, "outcome": "ran"}


def compare(rows: Mapping[str, Row]) -> list[Row]:
    """Return verdicts on losses and grad norms: of `agreement`, and of the timed runs against `sdpa`."""
    bar = rows.get("agreement")
    if bar is None or bar["kind"] != "agreement":
        return []
    allowed = bar["allowed"]
    comparisons = [(name, bar["tokens"], "fp32", difference) for name, difference in bar["rows"].items()]
    ran = {name: row for name, row in rows.items() if row["kind"] == "steps" and row["outcome"] == "ran"}
    plain = next((row for row in ran.values() if row["attention"] == "sdpa"), None)
    for name, row in ran.items():
        if plain is not None and row["attention"] == "ring_zigzag" and row["lengths"] == plain["lengths"]:
            difference = deviation({key: row[key] for key in allowed}, {key: plain[key] for key in allowed})
            comparisons.append((name.rsplit(", ", 1)[0], row["tokens"], "sdpa", difference))
    return [
        {
            "run": name,
            "tokens": tokens,
            "against": against,
            **difference,
            "allowed": allowed,
            "same": all(difference[key] <= allowed[key] for key in allowed),
        }
        for name, tokens, against, difference in comparisons
    ]


def run(
    device: torch.device,
    quick: bool,
    tiny: bool,
    report_progress: Callable[[str, int], None],
    previous: Mapping[str, Any],
    save: Callable[[Row], None],
) -> Row:
    """Return the section.

    Args:
        previous: the section of an earlier call, whose rows are not measured again.
        save: is called after each run, with the section so far.
    """
    planned_for = "h100" if device.type == "cpu" else None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        planned_for = planner_device(properties.name, properties.total_memory)
        if planned_for is None:
            why = f"the planner knows no {properties.name}, only {', '.join(DEVICES)}"
            return {"ok": True, "finished": True, "left_out": {"all runs": why}, "rows": {}, "agreement": []}
    bench = Bench(device, planned_for or "h100", tiny, quick)
    rows: dict[str, Row] = {}
    if all(row["same"] for row in previous.get("agreement", ())):
        rows = {name: row for name, row in previous.get("rows", {}).items() if row["kind"] != "failure"}
    left_out: dict[str, str] = {}
    start, num_postponed, budget = time.perf_counter(), 0, BUDGET["emulated" if tiny else "gpu"]
    all_cases = list(cases(bench))

    def section(finished: bool) -> Row:
        verdicts = compare(rows)
        ok = all(row["same"] for row in verdicts) and all(row["kind"] != "failure" for row in rows.values())
        about = {"model": bench.model.name, "tiny": tiny, "device": DEVICES[bench.planned_for].name}
        return {"ok": ok, "finished": finished, **about, "agreement": verdicts, "rows": rows, "left_out": left_out}

    for case in all_cases:
        report_progress(case.name, len(all_cases))
        if case.name in rows:
            continue
        if case.plan is not None and case.plan.memory.total > MAX_MEMORY_RATIO * case.plan.memory_budget:
            gib = [f"{num_bytes / 2**30:,.0f} GiB" for num_bytes in (case.plan.memory.total, case.plan.memory_budget)]
            left_out[case.name] = f"the planner says {gib[0]}, and the device has {gib[1]}"
            continue
        # The next run is assumed to exceed its prediction as much as the last one did.
        ratios = [row["ratio"]["seconds"] for row in rows.values() if "ratio" in row and device.type == "cuda"]
        expected = case.seconds * max([1.0, *ratios[-1:]])
        left = budget - (time.perf_counter() - start)
        if expected > left:
            fits_next_call = expected <= budget
            num_postponed += fits_next_call
            seconds = f"{expected:,.0f} s expected, {max(left, 0):,.0f} s of {budget:g} left"
            left_out[case.name] = seconds + "; run again to go on" * fits_next_call
            continue
        try:
            rows[case.name] = case.measure()
        except Exception as error:  # a variant that cannot run is a result of this check
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rows[case.name] = {"kind": "failure", "outcome": why}
        free(device)  # here, where no exception keeps the tensors of its frames
        save(section(finished=False))
    return section(finished=not num_postponed)
