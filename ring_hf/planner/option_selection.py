"""The cheapest memory options with which a job fits: which are needed, what each saves, and what it costs.

`OPTIONS` is in the order of cost: first options that cost almost no time, then communication for sharded weights,
rounded optimizer states, copies to host memory, recomputed attention, and the optimizer on the CPU. Of all
combinations that fit, `select_options` returns the one whose most costly option is the cheapest, then the second most
costly, and so on. If none fits, it doubles the number of devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..costmodel.devices import GIB, HOST_MEMORY
from ..text import format_tokens, markdown_table, wrap_prose
from .memory_estimate import MemoryEstimate, estimate_memory
from .model_config import read_model
from .optimizers import DEFAULT_OPTIMIZER, EIGHT_BIT_OPTIMIZER
from .step_times import estimate_times
from .training_job import TrainingJob

MAX_DEVICES = 1024
_TABLE_NOTE = (
    "GiB are those of a device, overhead included; s is a step of one sequence that all devices share. Without "
    "`fsdp`, `adam` or `weights` the engine is DDP, or one process. `needs 4`: the job does not fit on fewer than 4 "
    "devices, tried in powers of two."
)


@dataclass(frozen=True)
class MemoryOption:
    """A memory option.

    Attributes:
        name: description for the report.
        code: short name in tables.
        changes: settings of a job.
        offload: the name in `OFFLOADS` that it adds, "" for none.
        requires: code of an option that it makes no sense without, "" for none.
        excludes: codes of options that it makes no sense with.
    """

    name: str
    code: str
    changes: tuple[tuple[str, object], ...] = ()
    offload: str = ""
    requires: str = ""
    excludes: tuple[str, ...] = ()


OPTIONS = (
    MemoryOption("head and loss in blocks", "loss", (("loss_block", 2048),)),
    MemoryOption("layers recomputed, attention saved", "save", (("checkpoint", "save-attention"),)),
    MemoryOption("MLPs in blocks", "ffn", (("ffn_block", 4096),)),
    MemoryOption("weights, gradients, states sharded (FSDP2)", "fsdp", (("zero", 3),)),
    MemoryOption("8-bit optimizer states", "8bit", (("optimizer", EIGHT_BIT_OPTIMIZER),)),
    MemoryOption("layer inputs in host memory", "layers", offload="layers", requires="save"),
    MemoryOption("saved attention in host memory", "attention", offload="attention", requires="save"),
    MemoryOption(
        "attention recomputed", "recompute", (("checkpoint", "full"),), requires="save", excludes=("attention",)
    ),
    MemoryOption(
        "optimizer in host memory (DeepSpeed)",
        "adam",
        (("zero", 3),),
        offload="optimizer",
        excludes=("fsdp", "8bit"),
    ),
    MemoryOption("weights in host memory (FSDP2)", "weights", offload="weights", requires="adam"),
)
NO_OPTIONS = {"checkpoint": "none", "ffn_block": 0, "loss_block": 0, "zero": 0, "optimizer": DEFAULT_OPTIMIZER}


@dataclass(frozen=True)
class SelectionStep:
    """The job with the selected options up to `option` (None: with no option), its memory, and seconds of a step."""

    option: MemoryOption | None
    job: TrainingJob
    memory: MemoryEstimate
    seconds: float


@dataclass(frozen=True)
class OptionSelection:
    """The selected options, added one by one, on as many devices as they need.

    Attributes:
        requested_devices: the number of devices that the user asked for.
        min_excess: if these are too few, the bytes by which the best combination exceeds one of them.
    """

    steps: tuple[SelectionStep, ...]
    requested_devices: int
    min_excess: float = 0.0

    @property
    def job(self) -> TrainingJob:
        """The job with all selected options."""
        return self.steps[-1].job

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(step.option.code for step in self.steps if step.option)


def fits_memory(job: TrainingJob, memory: MemoryEstimate) -> bool:
    """Return whether the memory of a rank fits its device, and that of the ranks of a node its host memory."""
    return memory.total <= job.device_spec.memory and _host_bytes_per_node(job, memory) <= HOST_MEMORY


def _host_bytes_per_node(job: TrainingJob, memory: MemoryEstimate) -> float:
    return memory.host * min(job.devices, job.per_node)


def iter_combinations(job: TrainingJob) -> Iterator[tuple[MemoryOption, ...]]:
    """Yield all combinations of options that make sense, the cheapest first."""
    for number in range(2 ** len(OPTIONS)):
        options = tuple(option for bit, option in enumerate(OPTIONS) if number >> bit & 1)
        codes = {option.code for option in options}
        has_required = all(not option.requires or option.requires in codes for option in options)
        is_compatible = codes.isdisjoint(code for option in options for code in option.excludes)
        if has_required and is_compatible and not (job.devices == 1 and "fsdp" in codes):
            yield options


def with_options(job: TrainingJob, options: tuple[MemoryOption, ...]) -> TrainingJob:
    """Return the job with these memory options and no others."""
    changes = dict(NO_OPTIONS)
    for option in options:
        changes |= dict(option.changes)
    return job.replace(**changes, offload=tuple(option.offload for option in options if option.offload))


def select_options(job: TrainingJob) -> OptionSelection:
    """Return the cheapest options with which a job fits, on more devices if no combination is enough.

    Raises:
        ValueError: if the job does not fit on `MAX_DEVICES` devices.
    """
    all_share_sequence, min_excess = job.cp == job.devices, 0.0
    devices = job.devices
    while devices <= MAX_DEVICES:
        larger = job.replace(devices=devices, cp=devices if all_share_sequence else job.cp)
        excess = float("inf")
        for options in iter_combinations(larger):
            candidate = with_options(larger, options)
            memory = estimate_memory(candidate)
            if fits_memory(candidate, memory):
                return OptionSelection(tuple(_selection_steps(larger, options)), job.devices, min_excess)
            excess = min(excess, memory.total - job.device_spec.memory)
        if devices == job.devices:
            min_excess = excess
        devices *= 2
    raise ValueError(
        f"{job.model.name} at {job.length:,} tokens does not fit on {MAX_DEVICES:,} x {job.device_spec.name} with "
        "any memory option. Choose a shorter --seq, fewer --rows, a larger --device, or adapters (--lora)."
    )


def _selection_steps(job: TrainingJob, options: tuple[MemoryOption, ...]) -> Iterator[SelectionStep]:
    for count in range(len(options) + 1):
        changed = with_options(job, options[:count])
        option = options[count - 1] if count else None
        yield SelectionStep(option, changed, estimate_memory(changed), estimate_times(changed).step)


def format_selection(selection: OptionSelection) -> str:
    """Return a Markdown table of what each option saves and costs, and the options that are not needed."""
    steps, job = selection.steps, selection.job
    rows = [["memory options", "GiB per device", "saved", "seconds per step", "added", "host GiB per node"]]
    for previous, step in pairwise((None, *steps)):
        assert step is not None
        saved = f"{(previous.memory.total - step.memory.total) / GIB:,.1f}" if previous else ""
        added = f"{step.seconds - previous.seconds:+,.1f}" if previous else ""
        host = f"{_host_bytes_per_node(job, step.memory) / GIB:,.0f}"
        name = step.option.name if step.option else "none"
        rows.append([name, f"{step.memory.total / GIB:,.1f}", saved, f"{step.seconds:,.1f}", added, host])
    unneeded = [option.name for option in OPTIONS if option.code not in selection.codes]
    lines = [markdown_table(rows), wrap_prose(f"not needed: {'; '.join(unneeded)}")]
    if job.devices > selection.requested_devices:
        excess = f"{selection.min_excess / GIB:,.1f} GiB too much"
        if selection.min_excess <= 0:
            excess = "more host memory than a node has"
        devices = f"{selection.requested_devices} x {job.device_spec.name}"
        text = f"On {devices}, every combination of options needs {excess}; {job.devices} are enough:"
        lines.insert(0, wrap_prose(text))
    return "\n".join(lines)


def format_selection_cell(selection: OptionSelection) -> str:
    """Return the codes of a selection, GiB of a device and seconds of a step, or how many devices the job needs."""
    if selection.job.devices > selection.requested_devices:
        return f"needs {selection.job.devices}"
    last = selection.steps[-1]
    seconds = f"{last.seconds:,.0f}" if last.seconds >= 100 else f"{last.seconds:.3g}"
    return f"{' '.join(selection.codes) or 'none'}: {last.memory.total / GIB:.0f} GiB, {seconds} s"


TABLE_MODELS = ("Qwen3-0.6B", "Llama-3.1-8B", "Qwen3-32B", "Qwen3-30B-A3B")
TABLE_LENGTHS = (2**15, 2**17, 2**20)
TABLE_DEVICES = (1, 8, 32)


def make_selection_table() -> str:
    """Return the cheapest options on 1, 8 and 32 H100 for some models and lengths, as Markdown."""
    tables = []
    for name in TABLE_MODELS:
        model = read_model(name)
        rows = [[name, *(f"{devices} x H100" for devices in TABLE_DEVICES)]]
        for length in TABLE_LENGTHS:
            jobs = (TrainingJob(model, length, devices=devices) for devices in TABLE_DEVICES)
            rows.append([format_tokens(length), *(format_selection_cell(select_options(job)) for job in jobs)])
        tables.append(markdown_table(rows))
    codes = "; ".join(f"`{option.code}` {option.name}" for option in OPTIONS)
    return "\n\n".join((*tables, wrap_prose(f"{codes}."), wrap_prose(_TABLE_NOTE)))
