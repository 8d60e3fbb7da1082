"""Training steps of a model on one device: tokens/s, MFU and peak memory beside what the planner predicts for them.

The model has the shape of Qwen3-0.6B (the planner's table) and random weights, the Trainer is unmodified and runs in
bf16. At each length it trains with PyTorch's `sdpa`, with `ring_zigzag` in one process, and with `ring_hf.memory` on
top; then there is one rank's share of a ring of 8 (`ring_share`). The planner is asked before each run:

    which settings   the first of a variant's that fit the device
    whether at all   not if it would need far more memory than there is, or more time than the section has left

A run that was too large in spite of the plan is a result, "out of memory". Results are kept run by run. MFU counts
the FLOPs of the model, causal and without recomputation, over the device's dense peak in bf16.

`agreement` shows that what is timed is the same training: in short steps, `ring_zigzag` with and without memory
options may differ from one process in fp32 at most twice as much as `sdpa` in bf16 does; and the same bar holds for
the timed runs beside those of `sdpa` at the shortest length.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ring_hf import memory
from ring_hf.costmodel.devices import DEVICES
from ring_hf.memory.chunked_loss import automatic_block
from ring_hf.planner import Model, TrainingJob, TrainingPlan, plan, read_config
from ring_hf.planner.memory_estimate import MemoryEstimate
from ring_hf.planner.model_config import parse_config
from ring_hf.planner.step_times import estimate_passes

from . import ring_share
from .trainer_run import Run, free, make_model, train
from .training import HALF, STEPS, deviation

MODEL = "Qwen/Qwen3-0.6B"
LENGTHS = tuple(n * 1024 for n in (32, 64, 128, 256))
RANKS, RANK, RING_LENGTH = 8, 4, 128 * 1024  # of the ring; in zigzag all ranks have the same work
AGREEMENT = 2048  # tokens: few, as PyTorch has no flash attention in fp32
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 128, "vocab_size": 512, "head_dim": 16}
BUDGET = {"gpu": 200.0, "emulated": math.inf}  # seconds that the runs of one call may take
TIMED = 15.0  # seconds of timed steps of a run: as many as fit, from one to three
SETUP = 5.0  # seconds of a run besides its steps: assumed
TRIED = 1.25  # a run that the planner gives so many times the device's memory is tried all the same
# `torch._fused_sdp_choice`, and the published rate that belongs to a kernel.
SDPA = {0: "sdpa math", 1: "sdpa flash", 2: "sdpa efficient", 3: "sdpa cudnn"}
RATES = {"sdpa flash": "flash_attn_2", "cuda_flash": "flash_attn_2", "sdpa cudnn": "cuda_cudnn"}
# Not there when a rank's share runs alone.
OF_THE_EXCHANGE = (
    "exposed attention communication",
    "exposed weight communication",
    "gradient buckets (DDP)",
    "idle exchange buffers",
)


@dataclass(frozen=True)
class Scenario:
    """What a run switches on: for the planner, for the Trainer, and for `ring_hf.memory.apply`."""

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
# Saved attention would be that of every tile: a ring's is one operator, an emulated rank's is not.
SHARE = Scenario("recompute, blocks", {"checkpoint": "full"}, options={"attention": "recompute", **BLOCKS})
# Attention, and settings of which the first that fits is taken.
VARIANTS = {
    "sdpa": ("sdpa", (PLAIN, RECOMPUTE)),
    "ring_zigzag": ("ring_zigzag", (PLAIN, RECOMPUTE)),
    "ring_zigzag, memory options": ("ring_zigzag", (SAVE, OFFLOAD)),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A result: its name, the seconds that it will take, how it is measured, and the plan of its job if it is one."""

    name: str
    seconds: float
    measure: Callable[[], Row]
    plan: TrainingPlan | None = None


@dataclass
class Bench:
    """The device, the model, and what is asked of the planner about them."""

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
        """PyTorch's choice, which `sdpa` and `ring_zigzag` in one process both get."""
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

    def plan(self, setting: Scenario, length: int, ranks: int = 1) -> TrainingPlan:
        """The plan of a job, with the blocks that "auto" stands for and the rate of the kernel that will run."""
        kernel = self.kernel if ranks == 1 else self.share_kernel
        rate = RATES.get(kernel, kernel)
        blocks = {}
        if setting.options is not None:
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
                **setting.job,
                **blocks,
            )
        )


def planner_device(name: str, num_bytes: int) -> str | None:
    """The planner's name of a GPU: of those with its name the nearest in memory; None if it knows none.

    >>> planner_device("NVIDIA H100 80GB HBM3", 85e9), planner_device("NVIDIA GH200 480GB", 102e9)
    ('h100', None)
    """
    words = re.split(r"[^A-Za-z0-9]+", name)
    same = {key: device.memory for key, device in DEVICES.items() if device.name.split()[0] in words}
    return min(same, key=lambda key: abs(same[key] - num_bytes)) if same else None


def cases(bench: Bench) -> Iterator[Case]:
    """All results of the section: everything short, then memory options at all lengths, then what to compare with."""
    shortest, *longer = bench.lengths
    *others, last = VARIANTS
    yield Case("agreement", 4 * SETUP, lambda: agreement(bench))
    yield from (_whole_case(bench, name, shortest) for name in VARIANTS)
    yield from _share_cases(bench)
    yield from (_whole_case(bench, last, length) for length in longer)
    yield from (_whole_case(bench, name, length) for length in longer for name in others)


def _whole_case(bench: Bench, name: str, length: int) -> Case:
    attention, settings = VARIANTS[name]
    plans = [(setting, bench.plan(setting, length)) for setting in settings]
    setting, planned = next((pair for pair in plans if pair[1].fits), plans[-1])
    lengths = schedule(length, bench.plan(SAVE, length).times.step)  # the same for all variants
    run = Run(bench.keys, attention, lengths, setting.options, setting.recompute)
    return _steps_case(f"{name}, {length:,} tokens", bench, run, setting, planned)


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
    """Tokens of each step: a warm-up, then those that are timed. Where one step is timed, an eighth warms up."""
    timed = max(1, min(3, int(TIMED // seconds)))
    return (length if timed > 1 or whole_warm_up else length // 8, *[length] * timed)


def _without_exchange(planned: TrainingPlan) -> Row:
    """The parts of a step and the bytes of a plan, without what a rank alone does not do."""
    parts = {part.name: part.seconds for part in planned.times.parts if part.name not in OF_THE_EXCHANGE}
    items = tuple(item for item in planned.memory.items if item.name not in OF_THE_EXCHANGE)
    return {"parts": parts, "memory": MemoryEstimate(items).allocated}


def _steps_case(name: str, bench: Bench, run: Run, setting: Scenario, planned: TrainingPlan) -> Case:
    shared = planned.job.cp > 1
    alone = _without_exchange(planned)
    predicted = {"seconds": sum(alone["parts"].values()), "memory": alone["memory"]}
    kernel = bench.share_kernel if shared else bench.kernel
    about = {"kind": "steps", "attention": run.attention, "setting": setting.name, "kernel": kernel}
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
    """The row, or one that says that memory was not enough."""
    try:
        return {**measure(), "outcome": "ran"}
    except torch.OutOfMemoryError:
        return {**about, "outcome": "out of memory"}


def _attention_row(bench: Bench, length: int, planned: TrainingPlan) -> Row:
    taken = ring_share.time_attention(bench.model, length, RANKS, RANK, bench.device, repeats=3)
    costs = dict(zip(("forward", "backward"), estimate_passes(planned.job, None), strict=True))
    row: Row = {"kind": "attention", "kernel": bench.share_kernel, "tokens": length, "ranks": RANKS, "rank": RANK}
    for (name, cost), flops in zip(costs.items(), taken.pop("flops"), strict=True):
        seconds = statistics.median(taken[name])
        row[name] = {"seconds": seconds, "all_seconds": taken[name], "tflops": flops / seconds / 1e12}
        row[name] |= {"predicted": cost.compute, "ratio": seconds / cost.compute}
    return {**row, "outcome": "ran"}


def agreement(bench: Bench) -> Row:
    """Train each variant in short steps; how far it is from `sdpa` in fp32, and twice what `sdpa` in bf16 is."""
    length = 64 if bench.tiny else AGREEMENT
    lengths = (length,) * STEPS

    def curves(attention: str, setting: Scenario, bf16: bool = True) -> dict[str, list[float]]:
        run = Run(bench.keys, attention, lengths, setting.options, setting.recompute, bf16)
        steps = train(run, bench.device)
        free(bench.device)
        return steps.curves

    plain = curves("sdpa", RECOMPUTE, bf16=False)
    allowed = {name: HALF * far for name, far in deviation(curves("sdpa", RECOMPUTE), plain).items()}
    pairs = {"ring_zigzag": RECOMPUTE, "ring_zigzag, memory options": SAVE}
    rows = {name: deviation(curves("ring_zigzag", setting), plain) for name, setting in pairs.items()}
    return {"kind": "agreement", "tokens": length, "steps": STEPS, "allowed": allowed, "rows": rows, "outcome": "ran"}


def compare(rows: Mapping[str, Row]) -> list[Row]:
    """Judge losses and grad norms: of `agreement`, and of the timed runs beside `sdpa` at the shortest length."""
    bar = rows.get("agreement")
    if bar is None or bar["kind"] != "agreement":
        return []
    allowed = bar["allowed"]
    differences = [(name, bar["tokens"], "fp32", far) for name, far in bar["rows"].items()]
    ran = {name: row for name, row in rows.items() if row["kind"] == "steps" and row["outcome"] == "ran"}
    plain = next((row for row in ran.values() if row["attention"] == "sdpa"), None)
    for name, row in ran.items():
        if plain is not None and row["attention"] == "ring_zigzag" and row["lengths"] == plain["lengths"]:
            far = deviation({key: row[key] for key in allowed}, {key: plain[key] for key in allowed})
            differences.append((name.rsplit(", ", 1)[0], row["tokens"], "sdpa", far))
    return [
        {"run": name, "tokens": tokens, "against": against, **far, "allowed": allowed, "same": _within(far, allowed)}
        for name, tokens, against, far in differences
    ]


def _within(far: Mapping[str, float], allowed: Mapping[str, float]) -> bool:
    return all(far[name] <= allowed[name] for name in allowed)


def run(
    device: torch.device,
    quick: bool,
    tiny: bool,
    progress: Callable[[str, int], None],
    kept: Mapping[str, Any],
    keep: Callable[[Row], None],
) -> Row:
    """The section.

    Args:
        kept: what an earlier call left, whose rows are not measured again.
        keep: is called with the section as it is after each run.
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
    if all(row["same"] for row in kept.get("agreement", ())):
        rows = {name: row for name, row in kept.get("rows", {}).items() if row["kind"] != "failure"}
    left_out: dict[str, str] = {}
    begin, postponed, budget = time.perf_counter(), 0, BUDGET["emulated" if tiny else "gpu"]
    todo = list(cases(bench))

    def section(finished: bool) -> Row:
        agreed = compare(rows)
        ok = all(row["same"] for row in agreed) and all(row["kind"] != "failure" for row in rows.values())
        about = {"model": bench.model.name, "tiny": tiny, "device": DEVICES[bench.planned_for].name}
        return {"ok": ok, "finished": finished, **about, "agreement": agreed, "rows": rows, "left_out": left_out}

    for case in todo:
        progress(case.name, len(todo))
        if case.name in rows:
            continue
        if case.plan is not None and case.plan.memory.total > TRIED * case.plan.memory_budget:
            gib = [f"{num_bytes / 2**30:,.0f} GiB" for num_bytes in (case.plan.memory.total, case.plan.memory_budget)]
            left_out[case.name] = f"the planner says {gib[0]}, and the device has {gib[1]}"
            continue
        # What was slower than predicted so far is taken to remain so.
        slower = [row["ratio"]["seconds"] for row in rows.values() if "ratio" in row and device.type == "cuda"]
        expected, left = case.seconds * max([1.0, *slower[-1:]]), budget - (time.perf_counter() - begin)
        if expected > left:
            again = expected <= budget
            postponed += again
            seconds = f"{expected:,.0f} s expected, {max(left, 0):,.0f} s of {budget:g} left"
            left_out[case.name] = seconds + "; run again to go on" * again
            continue
        try:
            rows[case.name] = case.measure()
        except Exception as error:  # a variant that cannot run is a result of this check
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rows[case.name] = {"kind": "failure", "outcome": why}
        free(device)  # here, where no error holds the tensors of its frames any more
        keep(section(finished=False))
    return section(finished=not postponed)
