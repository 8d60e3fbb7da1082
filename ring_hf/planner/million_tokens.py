"""Published runs at a million tokens and more, compared with the same runs with saved attention.

The second prediction changes the transport (this package chooses it), blocks of tokens in MLPs and loss, and
attention, which is saved in host memory instead of recomputed. Engine, offload of states, kernel and devices stay
those of the run.
"""

from collections.abc import Iterator

from ..costmodel.devices import GIB, HOST_MEMORY
from ..text import markdown_table, wrap_prose
from .launch_command import format_launch
from .memory_estimate import estimate_memory
from .published import RUNS, PublishedRun
from .step_times import estimate_times
from .training_job import TrainingJob

COMPARED_RUNS = ("Qwen3-8B, 1M, 8", "Qwen3-8B, 4M, 32", "Qwen3-30B-A3B, 1M, 8", "Qwen3-32B, 1M, 8")
SAVED_ATTENTION = {"checkpoint": "save-attention", "ffn_block": 4096, "loss_block": 2048, "transport": "auto"}


def iter_compared_runs() -> Iterator[tuple[PublishedRun, TrainingJob]]:
    """Yield each run and its job with saved attention."""
    runs = {run.name: run for run in RUNS}
    for name in COMPARED_RUNS:
        run = runs[f"TRL #6845, {name} x H100"]
        job = run.build_job()
        yield run, job.replace(offload=(*job.offload, "attention"), **SAVED_ATTENTION)


def make_million_table() -> str:
    """Return the comparison as Markdown, and for each run the YAML and the command that launch it."""
    rows = [
        ["run", "seconds", "GB", "predicted s", "GB", "saved attention s", "GB", "host GiB per node"],
    ]
    launches, too_large = [], []
    for run, saved in iter_compared_runs():
        published = [f"{run.published[name]:,.4g}" if name in run.published else "" for name in ("seconds", "GB")]
        predictions = [*_predict(run.build_job()), *_predict(saved)]
        host_per_node = estimate_memory(saved).host * min(saved.devices, saved.per_node)
        if host_per_node > HOST_MEMORY:
            too_large.append(run.name)
        rows.append([run.name, *published, *predictions, f"{host_per_node / GIB:,.0f}"])
        launches.append(f"{run.name}:\n\n```text\n{format_launch(saved)}\n```")
    note = f"More than the {HOST_MEMORY / 1e12:g} TB of a node: {', '.join(too_large) or 'none of them'}."
    return "\n\n".join((markdown_table(rows), wrap_prose(note), *launches))


def _predict(job: TrainingJob) -> list[str]:
    return [f"{estimate_times(job).step:,.0f}", f"{estimate_memory(job).allocated / 1e9:.1f}"]
