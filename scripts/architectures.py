"""Write what the tests prove of architectures to where it is read: the table in docs/models.md, and the names of
classes that need no trial step in `ring_hf/hf/runtime/proven_classes.py`.

python scripts/architectures.py
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, PROVEN = ROOT / "docs" / "models.md", ROOT / "ring_hf" / "hf" / "runtime" / "proven_classes.py"
BEGIN, END = "<!-- generated: architectures -->", "<!-- end generated -->"
NAMES_BEGIN, NAMES_END = '_NAMES = """\n', '\n"""'
WIDTH = 115


def with_table(page: str) -> str:
    """Return the page of models with the table between its markers made from the tests' data."""
    sys.path.insert(0, str(ROOT))
    from tests.hf.architectures import markdown

    return _replace_between(page, BEGIN, END, f"\n{markdown()}\n", "docs/models.md")


def with_names(module: str) -> str:
    """Return `proven_classes.py` with the names of the classes that the tests compare."""
    sys.path.insert(0, str(ROOT))
    from tests.hf.architectures import exact_classes

    names = " ".join(sorted(exact_classes()))
    indent = " " * 4
    lines = textwrap.fill(names, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return _replace_between(module, NAMES_BEGIN, NAMES_END, lines, "proven_classes.py")


def _replace_between(text: str, begin: str, end: str, content: str, name: str) -> str:
    if text.count(begin) != 1:
        raise ValueError(
            f"{name} holds {text.count(begin)} times {begin!r}; it must hold it once, and {end!r} after it."
        )
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}{content}{end}", text)


if __name__ == "__main__":
    for path, renew in ((PAGE, with_table), (PROVEN, with_names)):
        path.write_text(renew(path.read_text()))
