"""The README and the pages of docs/, with their code blocks and commands, for tests that compare them with code."""

import re
import shlex
from dataclasses import dataclass

from tests.support.harness import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    language: str
    content: str


@dataclass(frozen=True)
class Command:
    """A command line of a bash block, split as a shell splits it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    def replaced(self, **values: str) -> list[str]:
        """Return the words with the values of some options replaced; each of the options must be there."""
        words = list(self.words)
        for option, value in values.items():
            assert f"--{option}" in words, f"--{option} in {self}"
            words[words.index(f"--{option}") + 1] = value
        return words


BLOCKS = [Block(page, *match) for page, text in PAGES.items() for match in _FENCE.findall(text)]
COMMANDS = [
    Command(block.page, tuple(shlex.split(line)))
    for block in BLOCKS
    if block.language == "bash"
    for line in re.split(r"\n|&&", block.content.replace("\\\n", " "))
    if line.strip()
]


def prose(page: str) -> str:
    """Return the text of a page without its code blocks."""
    return _FENCE.sub("", PAGES[page])


def commands(page: str, *first_words: str) -> list[Command]:
    """Return the commands of a page that begin with some words."""
    return [
        command for command in COMMANDS if command.page == page and command.words[: len(first_words)] == first_words
    ]


def command(page: str, *first_words: str) -> Command:
    """Return the only command of a page that begins with some words."""
    (match,) = commands(page, *first_words)
    return match


def excerpt(page: str, name: str) -> tuple[str, str]:
    """Return the arguments in the comment that opens an excerpt of a command's output, and the excerpt."""
    match = re.search(rf"<!-- {name}: (.*?) -->\n+(.*?)\n*<!-- end {name} -->", PAGES[page], re.DOTALL)
    assert match is not None, f"{page} has no excerpt {name!r}"
    return match[1], match[2]
