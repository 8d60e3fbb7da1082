"""`ring-hf plan`: whether a run fits, how long a step takes, and what each memory option saves."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..costmodel.devices import DEVICES
from ..geometry import LAYOUTS, TRANSPORTS
from ..text import HelpFormatter, parse_size, wrap_prose
from .million_tokens import make_million_table
from .model_config import read_model
from .model_table import MODEL_TABLE
from .optimizer_table import make_optimizer_table
from .optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS, PRECISIONS, OptimizerSpec
from .option_selection import format_selection, make_selection_table, select_options
from .paper_tables import (
    make_appendix_d_table,
    make_hundred_million_table,
    make_ring_attention_1_table,
    make_ring_attention_2_table,
)
from .plan_report import format_plan
from .published import make_published_table
from .training_job import CHECKPOINTS, OFFLOADS, TrainingJob
from .training_plan import plan

TABLES: dict[str, Callable[[], str]] = {
    "100m": make_hundred_million_table,
    "ring-attention-1": make_ring_attention_1_table,
    "ring-attention-2": make_ring_attention_2_table,
    "appendix-d": make_appendix_d_table,
    "published": make_published_table,
    "fit": make_selection_table,
    "million": make_million_table,
    "optimizers": make_optimizer_table,
}
# The settings of a job that --fit chooses; their options cannot be combined with it.
FIT_SETTINGS = (
    "zero",
    "dp_replicate",
    "optimizer",
    "precision",
    "offload",
    "checkpoint",
    "ffn_block",
    "loss_block",
    "fused",
)

_NAMES = wrap_prose("  " + ", ".join(name.rsplit("/", maxsplit=1)[-1] for name in MODEL_TABLE))


def _format_state_bytes(optimizer: OptimizerSpec) -> str:
    if optimizer.is_factored:
        return "rows and columns"
    return " / ".join(f"{optimizer.bytes_per_parameter(precision):.3g}" for precision in PRECISIONS.values())


_PRECISIONS = "\n".join(
    f"  {name:12} {p.weights} + {p.gradients} + {p.master}  {p.text}" for name, p in PRECISIONS.items()
)
_OPTIMIZERS = "\n".join(
    f"  {name:20} {_format_state_bytes(spec):18} {spec.package}" for name, spec in OPTIMIZERS.items()
)
_EXAMPLES = f"""examples:
  adapters of Qwen3 8B at one million tokens on one node
    ring-hf plan --model Qwen3-8B --seq 1M --devices 8 --lora 16 --offload layers --loss-block 2048
  the same without recomputing attention; as JSON and as a picture
    ring-hf plan --model Qwen3-8B --seq 1M --lora 16 --checkpoint save-attention --offload layers,attention \\
      --loss-block 2048 --json plan.json --png plan.png
  all parameters of a smaller model, on larger devices
    ring-hf plan --model Qwen3-4B --seq 1M --device h200 --offload layers --loss-block 2048
  all parameters of a larger model, sharded over the devices (FSDP2, DeepSpeed ZeRO-3)
    ring-hf plan --model Qwen3-8B --seq 1M --zero 3 --offload layers --loss-block 2048
  the cheapest memory options that fit, what each saves and costs, and how to launch the run
    ring-hf plan --model Qwen3-8B --seq 1M --fit
  8-bit optimizer states, by the Trainer's name; or all states in host memory (fsdp_offload_params)
    ring-hf plan --model Qwen3-8B --seq 1M --zero 3 --optimizer adamw_torch_8bit --offload layers --loss-block 2048
    ring-hf plan --model Qwen3-32B --seq 256K --zero 3 --offload optimizer,weights,layers --loss-block 2048
  your own model on four nodes, a ring across nodes and Ulysses inside
    ring-hf plan --model path/to/folder --seq 4M --devices 32 --ulysses 8 --ffn-block 4096 --loss-block 2048
  adapters on one GPU
    ring-hf plan --model Llama-3.1-8B --seq 128K --devices 1 --lora 16 --fused --loss-block 2048
  documented examples: {", ".join(TABLES)}
    ring-hf plan --table published
    ring-hf plan --table appendix-d --png price.png

models of the built-in table (with or without organisation, in any case):
{_NAMES}

precisions, bytes per parameter of weights + gradients + master weights:
{_PRECISIONS}

optimizers by the Trainer's names (optim), bytes per parameter of states with {" / ".join(PRECISIONS)}:
{_OPTIMIZERS}

Assumptions: bf16 compute; rates of kernels alone, published for head dim 128 (smaller ones are slower);
communication as in the cost model of `ring-hf simulate`; {DEVICES["h100"].source};
B200: {DEVICES["b200"].source}.
The engine is DDP (--zero 0), which holds everything on every device, unless options say otherwise: --zero 1 and 2 are
those stages of DeepSpeed, --zero 3 is FSDP2 (HSDP with --dp-replicate), or ZeRO-3 with --precision bf16-master.
--offload optimizer needs DeepSpeed, --offload optimizer,weights works with DeepSpeed and FSDP2. Settings that no
engine can run are refused.
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "plan",
        help="memory, time and the longest sequence of a training run, before it is started",
        description="Predicts the memory of a rank by item, the time of a step by part, the longest sequence that\n"
        "fits, how many tokens hide communication, the best split into ring and Ulysses, and what each option saves.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    command.add_argument("--table", choices=TABLES, help="print a documented example instead of a plan")
    command.add_argument("--json", type=Path, help="also write all numbers to this file")
    command.add_argument("--png", type=Path, help="also draw it to this file")
    run = command.add_argument_group("the run")
    run.add_argument("--model", help="folder or config.json of Transformers, or a name in the built-in table")
    run.add_argument("--seq", type=parse_size, default=2**20, help="tokens of the sequence, such as 1M (default: 1M)")
    run.add_argument("--rows", type=int, default=1, help="sequences in a batch")
    run.add_argument("--devices", type=int, default=8, help="number of devices (default: 8)")
    run.add_argument("--device", default="h100", choices=DEVICES, help="default: h100")
    run.add_argument("--devices-per-node", type=int, default=8, help="default: 8")
    run.add_argument("--node-bandwidth", type=float, default=0.0, help="bytes/s of a device inside a node, one way")
    run.add_argument(
        "--network-bandwidth", type=float, default=0.0, help="bytes/s of a device to another node, one way"
    )
    run.add_argument("--cp", type=int, default=0, help="devices that share a sequence (default: all)")
    memory = command.add_argument_group("memory options")
    memory.add_argument(
        "--zero",
        type=int,
        default=0,
        choices=(0, 1, 2, 3),
        help="stage of ZeRO; 0 is DDP, 3 is FSDP2 or ZeRO-3 (default: 0)",
    )
    memory.add_argument(
        "--dp-replicate", type=int, default=1, help="copies of sharded states, with --zero 3: HSDP (default: 1)"
    )
    memory.add_argument(
        "--optimizer", default=DEFAULT_OPTIMIZER, choices=OPTIMIZERS, help=f"the Trainer's optim ({DEFAULT_OPTIMIZER})"
    )
    memory.add_argument("--fit", action="store_true", help="choose memory options: the cheapest that fit")
    memory.add_argument(
        "--precision", default="auto", choices=("auto", *PRECISIONS), help="default: auto, that of the engine"
    )
    memory.add_argument("--offload", default="", help=f"tensors in host memory, a list of {', '.join(OFFLOADS)}")
    memory.add_argument("--checkpoint", default="full", choices=CHECKPOINTS, help="default: full")
    memory.add_argument("--ffn-block", type=parse_size, default=0, help="tokens of an MLP at a time")
    memory.add_argument("--loss-block", type=parse_size, default=0, help="tokens of the head and loss at a time")
    memory.add_argument("--fused", action="store_true", help="norms and activations that keep only inputs (Liger)")
    memory.add_argument("--fp8", action="store_true", help="linear layers in fp8")
    memory.add_argument("--lora", type=int, default=0, help="rank of adapters; all other weights are frozen")
    ring = command.add_argument_group("attention")
    ring.add_argument("--layout", default="zigzag", choices=LAYOUTS, help="default: zigzag")
    ring.add_argument("--transport", default="auto", choices=("auto", *TRANSPORTS), help="default: auto")
    ring.add_argument("--ulysses", default="1", help="ranks that exchange heads, or auto (default: 1)")
    ring.add_argument(
        "--head-chunks", type=int, default=1, help="chunks in which heads are exchanged (default: 1, all at once)"
    )
    ring.add_argument("--inner", type=int, default=1, help="ranks of an inner ring")
    ring.add_argument(
        "--kernel", default="auto", help="kernel whose published rate is used (default: auto, the fastest)"
    )


def make_job(options: argparse.Namespace) -> TrainingJob:
    """Return the job that the options describe.

    Raises:
        ValueError: if an option is wrong, or options contradict each other or the model.
    """
    if options.model is None:
        raise ValueError("--model is missing. Name a folder, a config.json or a known model, or ask for a --table.")
    if options.ulysses != "auto" and not (options.ulysses.isdecimal() and int(options.ulysses)):
        raise ValueError(f'--ulysses {options.ulysses!r} is not a number of ranks. Pass a divisor of --cp, or "auto".')
    if options.fit:
        fields = TrainingJob.__dataclass_fields__
        conflicting = [name for name in FIT_SETTINGS if getattr(options, name) not in (fields[name].default, "")]
        if conflicting:
            names = " ".join(f"--{name.replace('_', '-')}" for name in conflicting)
            raise ValueError(f"--fit chooses memory options itself, but {names} was given. Leave one of them out.")
    return TrainingJob(
        read_model(options.model),
        options.seq,
        devices=options.devices,
        device=options.device,
        per_node=options.devices_per_node,
        cp=options.cp,
        batch_size=options.rows,
        zero=options.zero,
        dp_replicate=options.dp_replicate,
        optimizer=options.optimizer,
        precision=options.precision,
        offload=tuple(filter(None, options.offload.split(","))),
        checkpoint=options.checkpoint,
        ffn_block=options.ffn_block,
        loss_block=options.loss_block,
        layout=options.layout,
        transport=options.transport,
        ulysses=0 if options.ulysses == "auto" else int(options.ulysses),
        inner=options.inner,
        head_chunks=options.head_chunks,
        kernel=options.kernel,
        fused=options.fused,
        fp8=options.fp8,
        lora=options.lora,
        node_bandwidth=options.node_bandwidth,
        network_bandwidth=options.network_bandwidth,
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan or a table, and write the JSON and the picture if their options are set; return 0.

    Raises:
        ValueError: if options contradict each other or the model, or the run does not fit with `--fit`.
    """
    if options.table:
        return _print_table(options)
    job = make_job(options)
    if options.fit:
        selection = select_options(job)
        print(format_selection(selection), end="\n\n")
        job = selection.job
    training_plan = plan(job)
    print(format_plan(training_plan))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"command": options.argv, **training_plan.as_dict()}, indent=1))
    if options.png is not None:
        from .plan_charts import draw_plan

        draw_plan(training_plan, options.png)
    return 0


def _print_table(options: argparse.Namespace) -> int:
    if options.json is not None:
        raise ValueError(f"--json with --table {options.table}: tables are text. Leave --json out, or plan a --model.")
    from .plan_charts import draw_appendix_d, draw_published

    pictures = {"appendix-d": draw_appendix_d, "published": draw_published}
    if options.png is not None and options.table not in pictures:
        raise ValueError(
            f"--png with --table {options.table}: only {', '.join(pictures)} have a picture. Leave --png out."
        )
    print(TABLES[options.table]())
    if options.png is not None:
        pictures[options.table](options.png)
    return 0
