"""A plan as text for a terminal: memory by item with bars, time by part, suggestions, and how to launch it."""

from collections.abc import Iterator

from ..costmodel.devices import GIB, HOST_MEMORY
from ..text import format_bytes, format_duration, format_tokens, markdown_table, wrap_prose
from .engine_bytes import describe_engine
from .launch_command import format_launch
from .step_times import cost_ratio, count_transports, model_flops_per_token
from .training_job import TrainingJob
from .training_plan import ParallelDegrees, TrainingPlan, estimate_ring_step

_BAR_WIDTH = 24


def format_plan(plan: TrainingPlan) -> str:
    """Return the whole report."""
    sections = [
        _format_heading(plan),
        _format_memory(plan),
        _format_times(plan),
        _format_communication(plan),
        _format_splits(plan),
        _format_suggestions(plan),
        format_launch(plan.job),
    ]
    return "\n\n".join(section for section in sections if section)


def _format_heading(plan: TrainingPlan) -> str:
    job, model = plan.job, plan.job.model
    name = f"{model.name}: {model.parameters / 1e9:.2f}B parameters, {model.layers} layers, hidden {model.hidden}"
    heads = f"{model.heads} / {model.kv_heads} heads x {model.head_dim}"
    if model.v_head_dim != model.head_dim:
        heads += f" and {model.v_head_dim}"
    for window, count in model.window_counts.items():
        if window:
            heads += f", {count} layers with a window of {window:,}"
    padding = f" (padded to {job.padded_length:,})" if job.padded_length != job.length else ""
    batch = f", batch size {job.batch_size}" if job.batch_size > 1 else ""
    degrees = f"ring {job.ring} x ulysses {job.ulysses}"
    if job.inner > 1:
        degrees += f", inner ring {job.inner}"
    if job.head_chunks > 1:
        degrees += f", heads in {job.head_chunks} chunks"
    if job.dp > 1:
        degrees += f" x {job.dp} data parallel"
    lines = [
        f"{name}, {heads}",
        f"  from {model.source}",
        f"{job.length:,} tokens{padding}{batch} on {job.devices} x {job.device_spec.name}, {job.layout}, "
        f"{degrees}; {job.tokens_per_rank:,} tokens per rank",
        wrap_prose(describe_engine(job)),
        wrap_prose(f"  {format_settings(job)}"),
    ]
    return "\n".join(lines)


def format_settings(job: TrainingJob) -> str:
    """Return optimizer, memory options and kernel rates of a job on one line."""
    adapters = f"LoRA rank {job.lora}, " if job.lora else ""
    settings = [f"{adapters}{job.optimizer}: {job.precision_spec.text}", f"checkpoint {job.checkpoint}"]
    if job.offload:
        settings.append(f"offload {' + '.join(job.offload)}")
    if job.ffn_block:
        settings.append(f"MLP blocks of {job.ffn_block:,}")
    if job.loss_block:
        settings.append(f"loss blocks of {job.loss_block:,}")
    if job.fused:
        settings.append("fused norms and activations")
    if job.fp8:
        settings.append("fp8 linear layers")
    kernel = next(iter(job.device_spec.kernels)) if job.kernel == "auto" else job.kernel
    forward, backward = job.device_spec.rates(job.kernel)
    settings.append(f"{kernel} at {forward / 1e12:.0f} / {backward / 1e12:.0f} TFLOP/s forward / backward")
    return "; ".join(settings)


def _bar(share: float) -> str:
    filled = round(_BAR_WIDTH * min(1.0, share))
    return "#" * filled + "." * (_BAR_WIDTH - filled)


def _format_memory(plan: TrainingPlan) -> str:
    memory, budget = plan.memory, plan.memory_budget
    peak_phase = memory.peak_phase

    def row(name: str, num_bytes: float) -> list[str]:
        share = num_bytes / budget
        return [name, f"{num_bytes / GIB:.2f}", f"{100 * share:.1f} %", _bar(share)]

    rows = [["memory per rank", "GiB", "of the device", ""]]
    rows += [row(item.name, item.num_bytes) for item in memory.items if not item.phase and not item.on_host]
    rows += [row(f"{peak_phase}: {item.name}", item.num_bytes) for item in memory.items if item.phase == peak_phase]
    rows += [row("overhead: runtime, fragmentation", memory.overhead), row("total", memory.total)]
    verdict = f"fits: {(budget - memory.total) / GIB:.1f} GiB to spare"
    if not plan.fits:
        verdict = f"does NOT fit: {(memory.total - budget) / GIB:.1f} GiB too much"
    max_length = "none, not even one token per rank"
    if plan.max_length:
        max_length = f"{plan.max_length:,} tokens ({format_tokens(plan.max_length)})"
    others = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.phases.items() if name != peak_phase)
    lines = [
        markdown_table(rows),
        f"{verdict} of {budget / GIB:.1f} GiB; longest sequence that fits with these settings: {max_length}",
        f"other phases, each with less memory (GiB): {others}",
    ]
    if memory.host:
        host_per_node = memory.host * min(plan.job.devices, plan.job.per_node)
        warning = ", more than a usual node has" if host_per_node > HOST_MEMORY else ""
        lines.append(f"host memory: {host_per_node / GIB:.0f} GiB per node{warning}")
    return "\n".join(lines)


def _format_times(plan: TrainingPlan) -> str:
    times, job = plan.times, plan.job
    rows = [["time per step", "seconds", "share", ""]]
    for part in times.parts:
        if part.seconds:
            share = f"{100 * part.seconds / times.step:.1f} %"
            rows.append([part.name, f"{part.seconds:.2f}", share, part.note])
    rows.append(["total", f"{times.step:.2f}", "", f"{times.tokens_per_device:,.0f} tokens/s per device"])
    flops = times.flops
    attention_share = flops.attention / (flops.attention + flops.linear)
    per_token, ratio = model_flops_per_token(job.model, job.padded_length), cost_ratio(job.model, job.padded_length)
    lines = [
        markdown_table(rows),
        f"causal MFU {100 * times.mfu:.1f} %, HFU {100 * times.hfu:.1f} % of {times.peak / 1e12:.0f} TFLOP/s; "
        f"executed FLOPs are {flops.executed / flops.model:.2f} times the model's, {100 * attention_share:.1f} % of "
        "which are attention",
        f"{per_token:.3g} FLOPs per token, {ratio:.1f} times those at 4K; "
        f"a rank sends {format_bytes(times.bytes_sent)} per step",
    ]
    return "\n".join(lines)


def _format_communication(plan: TrainingPlan) -> str:
    job = plan.job
    if job.ring == 1:
        return ""
    rows = [["tokens per rank to hide communication", "forward", "backward"]]
    rows += [[limit.link, f"{limit.forward:,.0f}", f"{limit.backward:,.0f}"] for limit in plan.thresholds]
    # A larger batch multiplies compute and messages alike.
    tokens = f"{job.tokens_per_rank // job.batch_size:,}"
    rows.append(["this job" + (", each sequence" if job.batch_size > 1 else ""), tokens, tokens])
    step = estimate_ring_step(job)
    passes = [
        f"{name} {format_duration(step[name]['compute'])} of compute, {format_bytes(step[name]['bytes'])} sent, "
        f"{format_duration(step[name]['exposed'])} exposed per layer"
        for name in ("forward", "backward")
    ]
    return f"{markdown_table(rows)}\n{step['transport']} of {step['steps']} steps, one step: {'; '.join(passes)}"


def _format_splits(plan: TrainingPlan) -> str:
    """Return this job, and the fastest transport of every split that is faster, with the options that select it."""
    job = plan.job
    if job.cp == 1:
        return ""
    this_job = ParallelDegrees.from_job(job)
    fastest = {job.ulysses: this_job}
    for split in plan.splits:
        if split.ulysses not in fastest or split.seconds < fastest[split.ulysses].seconds:
            fastest[split.ulysses] = split
    shown = [this_job, *(split for split in fastest.values() if split is not this_job)]
    rows = [["ring x ulysses", "transport", "attention and communication", "exposed", "options"]]
    for split in sorted(shown, key=lambda split: split.seconds):
        degrees, transports = f"{split.ring} x {split.ulysses}", [(split.transport, split.inner)]
        if split is this_job:
            degrees, transports = f"{degrees} (this job)", list(count_transports(job))
        names = " and ".join(name + (f" of {inner}" if inner > 1 else "") for name, inner in transports)
        rows.append([degrees, names, f"{split.seconds:.2f} s", f"{split.exposed:.3g} s", _split_options(split, job)])
    return markdown_table(rows, align="llr")


def _split_options(split: ParallelDegrees, job: TrainingJob) -> str:
    """Return the options that change the job to this split."""
    names = ("ulysses", "transport", "inner", "head_chunks")
    changed = [name for name in names if getattr(split, name) != getattr(job, name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(split, name)}" for name in changed)


def _format_suggestions(plan: TrainingPlan) -> str:
    return "\n".join(["suggestions, each on its own:", *_suggestion_lines(plan)]) if plan.suggestions else ""


def _suggestion_lines(plan: TrainingPlan) -> Iterator[str]:
    memory, seconds = plan.memory.total, plan.times.step
    width = max(len(suggestion.name) for suggestion in plan.suggestions)
    for suggestion in plan.suggestions:
        fits = ", fits" if not plan.fits and suggestion.memory <= plan.memory_budget else ""
        gib, extra_seconds = (suggestion.memory - memory) / GIB, suggestion.seconds - seconds
        change = f"{gib:+7.1f} GiB  {extra_seconds:+8.2f} s{fits}"
        yield f"  {suggestion.name:{width}}  {change}   {suggestion.options}"
