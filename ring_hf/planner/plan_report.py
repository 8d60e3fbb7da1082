"""A plan as text for a terminal: memory item by item with bars, time part by part, advice."""

from collections.abc import Iterable

from ..costmodel.devices import GIB, HOST_MEMORY
from ..text import format_bytes, format_duration, format_tokens, markdown_table, wrap_prose
from .engine_bytes import engine_line
from .launch_command import launch_text
from .step_times import attention_seconds, cost_ratio, layer_kinds, model_flops_per_token
from .training_job import Job
from .training_plan import ParallelDegrees, Plan, ring_step

_BAR = 24


def text_of(plan: Plan) -> str:
    """The whole report."""
    parts = [
        _heading(plan),
        _memory(plan),
        _time(plan),
        _exchange(plan),
        _splits(plan),
        _advice(plan),
        launch_text(plan.job),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(plan: Plan) -> str:
    job, model = plan.job, plan.job.model
    name = f"{model.name}: {model.parameters / 1e9:.2f}B parameters, {model.layers} layers, hidden {model.hidden}"
    heads = f"{model.heads} / {model.kv_heads} heads x {model.head_dim}"
    if model.v_head_dim != model.head_dim:
        heads += f" and {model.v_head_dim}"
    windows = {window: count for window, count in model.window_counts.items() if window}
    near = "".join(f", {count} layers with a window of {window:,}" for window, count in windows.items())
    ways = f"ring {job.ring} x ulysses {job.ulysses}" + (f", inner ring {job.inner}" if job.inner > 1 else "")
    ways += f", heads in {job.head_chunks} chunks" if job.head_chunks > 1 else ""
    groups = f" x {job.dp} data parallel" if job.dp > 1 else ""
    padded = f" (padded to {job.padded:,})" if job.padded != job.length else ""
    rows = f", {job.rows} rows" if job.rows > 1 else ""
    lines = [
        f"{name}, {heads}{near}",
        f"  from {model.source}",
        f"{job.length:,} tokens{padded}{rows} on {job.devices} x {job.device_facts.name}, {job.layout}, "
        f"{ways}{groups}; {job.tokens:,} tokens a rank",
        wrap_prose(engine_line(job)),
        wrap_prose(f"  {settings_of(job)}"),
    ]
    return "\n".join(lines)


def settings_of(job: Job) -> str:
    """The levers in words."""
    trained = f"LoRA rank {job.lora}, " if job.lora else ""
    words = [f"{trained}{job.optimizer}: {job.precision_facts.text}", f"checkpoint {job.checkpoint}"]
    words += [f"offload {' + '.join(job.offload)}"] if job.offload else []
    words += [f"MLP blocks of {job.ffn_block:,}"] if job.ffn_block else []
    words += [f"loss blocks of {job.loss_block:,}"] if job.loss_block else []
    words += ["fused norms and activations"] if job.fused else []
    words += ["fp8 linear layers"] if job.fp8 else []
    kernel = next(iter(job.device_facts.kernels)) if job.kernel == "auto" else job.kernel
    forward, backward = job.device_facts.rates(job.kernel)
    words += [f"{kernel} at {forward / 1e12:.0f} / {backward / 1e12:.0f} TFLOP/s forward / backward"]
    return "; ".join(words)


def _bar(share: float) -> str:
    filled = round(_BAR * min(1.0, share))
    return "#" * filled + "." * (_BAR - filled)


def _memory(plan: Plan) -> str:
    memory, room = plan.memory, plan.room
    rows = [["memory of a rank", "GiB", "of the device", ""]]

    def row(name: str, num_bytes: float) -> list[str]:
        share = num_bytes / room
        return [name, f"{num_bytes / GIB:.2f}", f"{100 * share:.1f} %", _bar(share)]

    rows += [row(item.name, item.num_bytes) for item in memory.items if not item.moment and not item.on_host]
    rows += [
        row(f"{memory.worst}: {item.name}", item.num_bytes) for item in memory.items if item.moment == memory.worst
    ]
    rows += [row("runtime, fragmentation (allowance)", memory.allowance), row("total", memory.total)]
    verdict = f"fits: {(room - memory.total) / GIB:.1f} GiB to spare"
    if not plan.fits:
        verdict = f"does NOT fit: {(memory.total - room) / GIB:.1f} GiB too much"
    longest = (
        f"{plan.longest:,} tokens ({format_tokens(plan.longest)})" if plan.longest else "not even one token a rank"
    )
    others = ", ".join(f"{name} {value / GIB:.1f}" for name, value in memory.moments.items() if name != memory.worst)
    lines = [
        markdown_table(rows),
        f"{verdict} of {room / GIB:.1f} GiB; the longest that fits with these settings: {longest}",
        f"not at the same time, and smaller (GiB): {others}",
    ]
    if memory.host:
        on_node = memory.host * min(plan.job.devices, plan.job.per_node)
        warning = ", more than a usual node has" if on_node > HOST_MEMORY else ""
        lines.append(f"host memory: {on_node / GIB:.0f} GiB a node{warning}")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    times, job = plan.times, plan.job
    rows = [["time of a step", "seconds", "share", ""]]
    rows += [
        [part.name, f"{part.seconds:.2f}", f"{100 * part.seconds / times.step:.1f} %", part.note]
        for part in times.parts
        if part.seconds
    ]
    rows.append(["total", f"{times.step:.2f}", "", f"{times.tokens_per_device:,.0f} tokens/s on each device"])
    flops = times.flops
    attention = flops.attention / (flops.attention + flops.linear)
    each, ratio = model_flops_per_token(job.model, job.padded), cost_ratio(job.model, job.padded)
    used, again = f"causal MFU {100 * times.mfu:.1f} %, HFU {100 * times.hfu:.1f} %", flops.executed / flops.model
    said = (
        f"{used} of {times.peak / 1e12:.0f} TFLOP/s; executed are {again:.2f} of the model's FLOPs, of which "
        f"{100 * attention:.1f} % are attention",
        f"{each:.3g} FLOPs a token, {ratio:.1f} times those at 4K; a rank sends {format_bytes(times.sent)} a step",
    )
    return "\n".join((markdown_table(rows), *said))


def _exchange(plan: Plan) -> str:
    if plan.job.ring == 1:
        return ""
    step = ring_step(plan.job)
    rows = [["tokens a rank needs to hide the exchange", "forward", "backward"]]
    rows += [[limit.link, f"{limit.forward:,.0f}", f"{limit.backward:,.0f}"] for limit in plan.thresholds]
    each = f"{plan.job.tokens // plan.job.rows:,}"  # rows multiply what is computed and what travels alike
    rows.append(["this job" + (", of each row" if plan.job.rows > 1 else ""), each, each])
    said = [
        f"{name}: {format_duration(step[name]['compute'])} beside {format_bytes(step[name]['bytes'])}, "
        f"{format_duration(step[name]['exposed'])} a layer not hidden"
        for name in ("forward", "backward")
    ]
    way = f"{step['transport']} of {step['steps']} steps, a step computes and a rank sends in it: {'; '.join(said)}"
    return f"{markdown_table(rows)}\n{way}"


def _splits(plan: Plan) -> str:
    """This job, and of every split the fastest way, if this job is not as fast, with the options that give it."""
    job = plan.job
    if job.cp == 1:
        return ""
    compute, exposed, _ = attention_seconds(job)
    own = ParallelDegrees(job.ulysses, job.ring, job.inner, job.transport, job.head_chunks, compute + exposed, exposed)
    fastest = {job.ulysses: own}
    for split in plan.splits:
        if split.ulysses not in fastest or split.seconds < fastest[split.ulysses].seconds:
            fastest[split.ulysses] = split
    rows = [["ring x ulysses", "by", "attention and exchange", "not hidden", "options"]]
    shown = [own, *(split for split in fastest.values() if split is not own)]
    for split in sorted(shown, key=lambda split: split.seconds):
        here = " (this job)" if split is own else ""
        ways = layer_kinds(job) if split is own else [(split.transport, split.inner)]
        names = " and ".join(name + (f" of {inner}" if inner > 1 else "") for name, inner in ways)
        rows.append([f"{split.ring} x {split.ulysses}{here}", names])
        rows[-1] += [f"{split.seconds:.2f} s", f"{split.exposed:.3g} s", _options(split, job)]
    return markdown_table(rows, align="llr")


def _options(split: ParallelDegrees, job: Job) -> str:
    """What to add to the job's command for this split."""
    names = ("ulysses", "transport", "inner", "head_chunks")
    changed = [name for name in names if getattr(split, name) != getattr(job, name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(split, name)}" for name in changed)


def _advice(plan: Plan) -> str:
    return "\n".join(["levers, one at a time:", *_changes(plan)]) if plan.levers else ""


def _changes(plan: Plan) -> Iterable[str]:
    memory, seconds = plan.memory.total, plan.times.step
    wide = max(len(lever.name) for lever in plan.levers)
    for lever in plan.levers:
        fits = ", fits" if not plan.fits and lever.memory <= plan.room else ""
        gib, late = (lever.memory - memory) / GIB, lever.seconds - seconds
        yield f"  {lever.name:{wide}}  {gib:+7.1f} GiB  {late:+8.2f} s{fits}   {lever.options}"
