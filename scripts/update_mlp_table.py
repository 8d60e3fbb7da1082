"""Writes the table of feed-forward classes, `ring_hf/memory/mlp_classes.py`, as the probe finds them.

Listed classes that the installed Transformers lacks stay in the table: another release has them.

    python scripts/update_mlp_table.py
"""

import importlib
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "ring_hf" / "memory" / "mlp_classes.py"
BEGIN, END = "# generated: tables\n", "# end of generated\n"
WIDTH = 115


def table_text() -> str:
    """Return the generated part of the module: every family is built and tried, which takes a minute."""
    sys.path.insert(0, str(ROOT))
    from ring_hf.verify.mlp_families import build, family_names, probe, token_wise_activations

    families = [probe(model) for model in map(build, family_names()) if model is not None]
    return format_tables(families, token_wise_activations())


def format_tables(families: list, activations: set[str]) -> str:
    """Return the source of the tables.

    Args:
        families: `ring_hf.verify.mlp_families.Family` of each.
        activations: qualified names of activation functions.
    """
    from ring_hf.memory.mlp_classes import INNER_CLASSES, MLP_CLASSES, PREFIX

    specs = {name: spec for name, spec in MLP_CLASSES.items() if not _is_installed(name)}
    specs |= {name: spec for family in families for name, spec in family.specs.items()}
    by_arguments: dict[str, list[str]] = {}
    for name, spec in sorted(specs.items()):
        pairs = spec.token_dims.items()
        arguments = " ".join(argument if num == 1 else f"{argument}:{num}" for argument, num in pairs)
        by_arguments.setdefault(arguments, []).append(name.removeprefix(PREFIX))
    again = sorted(name.removeprefix(PREFIX) for name, spec in specs.items() if not spec.is_called_once)
    inner_of_others = {name for name in INNER_CLASSES if not _is_installed(name)}
    inner = sorted(activations.union(inner_of_others, *(family.inner_classes for family in families)))
    lines = ["_CLASSES = {"]
    for arguments, names in sorted(by_arguments.items()):
        lines += [f'    "{arguments}": """', _fill(names, 8), '    """,']
    lines += ["}", '_CALLED_AGAIN = """', _fill(again, 4), '"""', '_INNER_CLASSES = """', _fill(inner, 4), '"""', ""]
    return "\n".join(lines)


def _is_installed(name: str) -> bool:
    module, _, class_name = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError:
        return False


def _fill(names: list[str], indent: int) -> str:
    indentation = " " * indent
    return textwrap.fill(
        " ".join(names), WIDTH, initial_indent=indentation, subsequent_indent=indentation, break_on_hyphens=False
    )


def with_tables(source: str, tables: str) -> str:
    """Return the source of the module with other tables between its markers."""
    if source.count(BEGIN) != 1:
        raise ValueError(f"{TABLE.name} must hold {BEGIN!r} once, and {END!r} after it.")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}{tables}{END}", source)


if __name__ == "__main__":
    TABLE.write_text(with_tables(TABLE.read_text(), table_text()))
