"""Published runs at a million tokens and more, beside what saved attention would make of them, and the files to run.

Changed are the transport, which is this package's choice, blocks of tokens in MLPs and loss, and attention, which is
saved in host memory instead of computed again. Engine, offload of states, kernel and devices are those of the run.
"""

from collections.abc import Iterator

from ..costmodel.devices import GIB, HOST_MEMORY
from ..text import markdown_table, wrap_prose
from .launch_command import launch_text
from .memory_estimate import memory_of
from .published import RUNS, Run
from .step_times import times_of
from .training_job import Job

COMPARED = ("Qwen3-8B, 1M, 8", "Qwen3-8B, 4M, 32", "Qwen3-30B-A3B, 1M, 8", "Qwen3-32B, 1M, 8")
SAVED = {"checkpoint": "save-attention", "ffn_block": 4096, "loss_block": 2048, "transport": "auto"}


def compared_runs() -> Iterator[tuple[Run, Job]]:
    """Yield each run with the job that saves attention."""
    for name in COMPARED:
        (run,) = [run for run in RUNS if run.name == f"TRL #6845, {name} x H100"]
        job = run.build()
        yield run, job.but(offload=(*job.offload, "attention"), **SAVED)


def million_table() -> str:
    """Return the comparison, and for each run the YAML and the command that ask for it."""
    rows = [["run", "seconds", "GB", "predicted s", "GB", "saved attention s", "GB", "GiB of a host"]]
    texts, too_much = [], []
    for run, saved in compared_runs():
        job = run.build()
        published = [f"{run.published[name]:,.4g}" if name in run.published else "" for name in ("seconds", "GB")]
        figures = [text for each in (job, saved) for text in (f"{times_of(each).step:,.0f}", _gigabytes(each))]
        on_node = memory_of(saved).host * min(saved.devices, saved.per_node)
        too_much += [run.name] if on_node > HOST_MEMORY else []
        rows.append([run.name, *published, *figures, f"{on_node / GIB:,.0f}"])
        texts.append(f"{run.name}:\n\n```text\n{launch_text(saved)}\n```")
    note = f"More than the {HOST_MEMORY / 1e12:g} TB of a node: {', '.join(too_much) or 'none of them'}."
    return "\n\n".join((markdown_table(rows), wrap_prose(note), *texts))


def _gigabytes(job: Job) -> str:
    return f"{memory_of(job).allocated / 1e9:.1f}"
