"""The table of traps in tests/README.md must name existing tests."""

import re

from tests.support.harness import ROOT


def test_every_trap_names_tests_that_exist():
    text = (ROOT / "tests" / "README.md").read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 74
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, f"no test in: {row}"
        assert set(names) <= defined, f"unknown test in: {row}"
