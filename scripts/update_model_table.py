"""Write the verdicts of `ring_hf/verify/family_verdicts.py` into the files that show or use them.

These are the table of families in docs/models.md, and the names of classes that need no trial step in
`ring_hf/hf/runtime/proven_classes.py`.

    python scripts/update_model_table.py
    python scripts/update_model_table.py --check    # write nothing; exit with 1 if a file would change
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.verify.family_verdicts import exact_classes, markdown

ROOT = Path(__file__).resolve().parents[1]
TABLE, NAMES = ROOT / "docs" / "models.md", ROOT / "ring_hf" / "hf" / "runtime" / "proven_classes.py"
TABLE_BEGIN, TABLE_END = "<!-- generated: architectures -->", "<!-- end generated -->"
NAMES_BEGIN, NAMES_END = '_NAMES = """\n', '\n"""'
WIDTH = 115


def with_table(text: str) -> str:
    """Return the document with the table of families between its markers."""
    return _replace_between(text, TABLE_BEGIN, TABLE_END, f"\n{markdown()}\n", TABLE.name)


def with_names(text: str) -> str:
    """Return the module with the names of all exact classes."""
    names = " ".join(sorted(exact_classes()))
    indent = " " * 4
    lines = textwrap.fill(names, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return _replace_between(text, NAMES_BEGIN, NAMES_END, lines, NAMES.name)


def _replace_between(text: str, begin: str, end: str, content: str, name: str) -> str:
    if text.count(begin) != 1:
        raise ValueError(
            f"{name} holds {text.count(begin)} times {begin!r}; it must hold it once, and {end!r} after it."
        )
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}{content}{end}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    options = parser.parse_args()
    stale = []
    for path, update in ((TABLE, with_table), (NAMES, with_names)):
        text = path.read_text()
        if (updated := update(text)) != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(updated)
    if options.check and stale:
        print(f"{', '.join(stale)}: not up to date. Run python scripts/update_model_table.py.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
