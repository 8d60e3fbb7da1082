"""Writes the table of architectures into the README, from the same data that the tests prove.

python scripts/architectures.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- generated: architectures -->", "<!-- end generated -->"


def with_table(readme: str) -> str:
    """The README with the table between its markers made anew."""
    sys.path.insert(0, str(ROOT))
    from tests.hf.architectures import markdown

    if readme.count(BEGIN) != 1:
        raise ValueError(f"README.md holds {readme.count(BEGIN)} lines {BEGIN}; it must hold one, and {END} after it.")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{markdown()}\n{END}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text()))
