"""`ring-hf` as a command: pictures, tables, JSON, its own examples, and what it refuses."""

import json
import re
import shlex
import sys
import tomllib

import numpy
import pytest
from PIL import Image

from ring_hf.cli import main
from ring_hf.geometry import LAYOUTS
from tests.support.harness import ROOT, run_command

COMMAND = [sys.executable, "-m", "ring_hf.cli"]


def read_table(text, first_columns):
    """Return the rows, as dicts, of the Markdown table whose first two columns have these names."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    start = next(n for n, cells in enumerate(lines) if cells[:2] == first_columns)
    names, _, *rows = (cells for cells in lines[start:] if cells)
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def test_the_command_is_an_entry_point():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ring-hf": "ring_hf.cli:main"}


def test_show_writes_a_small_picture_and_prints_its_numbers(tmp_path):
    path = tmp_path / "new" / "zigzag.png"
    done = run_command(
        [*COMMAND, "show", "--layout", "zigzag", "contiguous", "--cp", "8", "--seq", "64K", "--output", str(path)]
    )
    # 7 hops of 8,192 tokens, 8 heads of 128, keys and values, 2 bytes.
    assert "zigzag: busiest / mean 1.0000; a rank sends 235 MB, in a step at most 33.6 MB" in done.stdout
    assert "contiguous: busiest / mean 1.8750" in done.stdout
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 60_000


def colours(path):
    """Return the colours of a picture in 16 shades of red, green and blue, as one number each, which sort faster."""
    rgb = numpy.asarray(Image.open(path).convert("RGB")).astype(int)
    return numpy.unique(rgb // 16 @ [256, 16, 1])


@pytest.mark.parametrize(
    "arguments",
    [
        "--seq 4K",
        "--seq 4K --transport allgather",
        "--seq 4K --transport double_ring --inner 2 --full",
        "--seq 4K --window 512 --transport direct",
        "--seq 4000 --documents 1000,500,1700 --prefix 300 --ulysses 2",
        "--seq 4K --num-documents 30 --documents-seed 3 --chunk 700",
        "--seq 256 --cp 32",
    ],
)
def test_every_layout_mask_and_transport_can_be_drawn(arguments, tmp_path, capsys):
    path = tmp_path / "picture.png"
    assert main(["show", "--layout", *LAYOUTS, "--cp", "4", *arguments.split(), "--output", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": busiest / mean ")[0] for line in lines[:-1]] == list(LAYOUTS)
    assert len(colours(path)) > 12  # the hues of the ranks, in shades


def test_a_picture_shows_which_rank_computes_what(tmp_path):
    from ring_hf.geometry import Mask
    from ring_hf.simulate.scenario import Scenario
    from ring_hf.simulate.schedule_drawing import _owner, _visible
    from ring_hf.testing import dense_mask

    tokens = numpy.arange(64)
    scenario = Scenario(4, 64, Mask(window=20), (10, 30), (4,))
    for layout in LAYOUTS:
        sequence = scenario.sequence(layout)
        assert numpy.array_equal(_visible(sequence, scenario.mask, tokens), dense_mask(sequence, scenario.mask, 1)[0])
        shards = {rank: [n for s in sequence.ring_segments(rank) for n in s.range] for rank in range(4)}
        owners = _owner(sequence, tokens.tolist())
        assert all(n in shards[rank] for n, rank in enumerate(owners))


def test_simulate_prints_tables_and_writes_json(tmp_path):
    path = tmp_path / "simulation.json"
    done = run_command(
        [*COMMAND, "simulate", "--cp", "32", "--seq", "32K", "--flops", "593.4e12", "--json", str(path)]
    )
    assert done.stdout.startswith(
        "32,768 tokens, causal; 32 ranks; 32 / 8 heads x 128, 2 bytes; h100, 8 ranks per node"
    )
    balance = read_table(done.stdout, ["layout", "tokens, padded"])
    assert {row["layout"]: row["busiest / mean"] for row in balance} == {
        "contiguous": "1.9687", "zigzag": "1.0000", "striped": "1.0009", "balanced": "1.0000",
    }  # fmt: skip
    rows = read_table(done.stdout, ["layout", "algorithm"])
    algorithms = ["ring", "double ring of 8", "all-gather", "direct", "hybrid, ring of 4 x ulysses 8"]
    assert [row["algorithm"] for row in rows] == algorithms * 4 + ["ulysses"]
    saved = json.loads(path.read_text())
    assert saved["command"] == ["simulate", "--cp", "32", "--seq", "32K", "--flops", "593.4e12", "--json", str(path)]
    assert len(saved["algorithms"]) == len(rows) and len(saved["layouts"]) == 4
    by_name = {(row["layout"], row["algorithm"]): row for row in saved["algorithms"]}
    # 31 hops of 1,024 tokens of 8 heads of 128, keys and values, 2 bytes.
    assert by_name["zigzag", "ring"]["sent_forward"] == 31 * 1024 * 8 * 256 * 2
    assert by_name["zigzag", "ring"]["efficiency"] < 0.2 < 0.3 < by_name["zigzag", "double ring of 8"]["efficiency"]
    assert by_name["contiguous", "direct"]["sent_forward"] == 31 * 512 * 8 * 256 * 2


def test_a_thousand_ranks_are_simulated_in_seconds(capsys):
    assert main(["simulate", "--cp", "1024", "--seq", "1M", "--layout", "zigzag", "--num-documents", "300"]) == 0
    (row,) = read_table(capsys.readouterr().out, ["layout", "tokens, padded"])
    assert row["tokens, padded"] == "1,048,576"


@pytest.mark.parametrize("command", ["show", "simulate"])
def test_help_teaches_by_examples_that_run(command, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    examples = re.findall(r"^ +(ring-hf .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 4
    monkeypatch.chdir(tmp_path)
    for example in examples:
        argv = shlex.split(example.replace("--cp 1024", "--cp 128"))  # the full one takes a minute
        assert argv[1] == command and main(argv[1:]) == 0
        for option in ("--output", "--json"):
            assert option not in argv or (tmp_path / argv[argv.index(option) + 1]).is_file()


REFUSED = [
    ("show --seq 64X", "invalid parse_size value: '64X'"),
    ("show --layout diagonal", "invalid choice: 'diagonal'"),
    ("show --transport double_ring", "inner_ring_size=1 cannot cut a ring of 8"),
    ("show --inner 2", "--inner 2 with --transport ring: only a double ring has inner rings. Add"),
    ("show --ulysses 3", "ulysses_size=3 does not divide the 8 ranks"),
    ("show --seq 1K --documents 800,300", "The documents hold 1100 tokens, the sequence 1024. Make --seq larger"),
    ("show --seq 1K --documents 800,0", "Document 1 has 0 tokens. Give every document at least one."),
    ("show --seq 16 --num-documents 17", "num_documents=17 do not fit into 16 tokens"),
    (
        "show --documents 4 --num-documents 2",
        "--documents and --num-documents both describe the packed documents. Give one",
    ),
    ("show --full --prefix 4", "Prefixes need a causal mask without chunks: drop the prefixes or use such a mask."),
    ("simulate --heads 6 --kv-heads 4", "--kv-heads 4 does not divide --heads 6"),
    ("simulate --inner 3", "--inner 3 cannot cut a ring of 8 ranks into several equal rings"),
    ("simulate --ulysses 3", "--ulysses 3 does not fit 8 ranks and 32 query heads"),
    ("simulate --flops -1", "--flops -1.0 must be positive"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_options_that_cannot_work_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    argv = arguments.split()
    output = ["--output", str(tmp_path / "picture.png")] if argv[0] == "show" else []
    try:
        code = main([*argv, *output])
    except SystemExit as stop:  # argparse refuses a single argument
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    "arguments", ["show --output {}/plan.png", "plan --model Qwen3-8B --seq 1M --json {}/plan.json"]
)
def test_a_file_that_cannot_be_written_is_named(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(arguments.format(tmp_path / "file").split()) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.endswith(". Name another file.\n") and "Traceback" not in error


def test_other_os_errors_keep_their_traceback(monkeypatch):
    def failing(options):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("ring_hf.simulate.show_command.run", failing)
    with pytest.raises(ConnectionRefusedError):
        main(["show", "--output", "picture.png"])
