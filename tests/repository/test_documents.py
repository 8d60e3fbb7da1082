"""The README and the pages of docs/ agree with the repository: commands parse, links, paths, names and messages exist,
and the site builds."""

import ast
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from arguments import PerplexityArguments, SourceArguments, parse
from evaluate import EvaluationArguments
from finetune import ARGUMENTS
from sft import ARGUMENTS as SFT

from ring_hf.cli import parser
from tests.repository.documents import BLOCKS, COMMANDS, PAGES, prose
from tests.support.harness import ROOT, run_command

LANGUAGES = {"bash", "diff", "python", "text", "yaml"}
RECIPES = {
    "recipes/evaluate.py": (EvaluationArguments,),
    "recipes/finetune.py": ARGUMENTS,
    "recipes/perplexity.py": (PerplexityArguments, SourceArguments),
    "recipes/sft.py": SFT,
}
PROGRAMS = {"ruff", "mypy", "mkdocs"}  # of the development environment
_FOLDERS = r"(?:ring_hf|recipes|configs|scripts|tests|docs)"
_PATH = re.compile(rf"(?<![\w/.-]){_FOLDERS}/(?:[\w.-]+/)*[\w-]*(?:\.[a-z]+\b)?")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_SPAN = re.compile(r"`([^`\n]+)`")


def test_every_block_names_its_language():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert all(text.count("```") == 2 * sum(b.page == page for b in BLOCKS) for page, text in PAGES.items())
    assert len(BLOCKS) >= 28


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_parses(command):
    program, *arguments = command.words
    if program == "ring-hf":
        parser().parse_args(arguments)
    elif program in ("accelerate", "python"):
        script = next(word for word in arguments if word.endswith(".py"))
        launcher_arguments = arguments[: arguments.index(script)]
        assert (ROOT / script).is_file()
        assert program == "python" or (ROOT / launcher_arguments[2]).is_file(), launcher_arguments
        check_script_arguments(script, arguments[arguments.index(script) + 1 :])
    elif program in PROGRAMS:
        assert shutil.which(program, path=str(Path(sys.executable).parent))
    else:
        assert program in ("scripts/quickstart", "scripts/test") and (ROOT / program).is_file()
        assert all((ROOT / word).exists() for word in arguments)


def check_script_arguments(script, arguments):
    if script in RECIPES:
        # bf16 asks for a GPU when it is parsed.
        parse(RECIPES[script], "", [word for word in arguments if word not in ("--bf16", "true")], use_cpu=True)
    else:
        options = [word for word in arguments if word.startswith("--")]
        # gpu_check.py has the options of `ring-hf verify`.
        source = "ring_hf/verify/verify_command.py" if script == "scripts/gpu_check.py" else script
        assert all(f'"{option}"' in (ROOT / source).read_text() for option in options)


def test_commands_of_all_programs_are_checked():
    programs = [command.words[0] for command in COMMANDS]
    assert programs.count("ring-hf") >= 12 and programs.count("accelerate") == 4 and len(programs) >= 18


def test_commands_in_the_text_parse():
    spans = [span for page in PAGES for span in _SPAN.findall(prose(page)) if span.startswith("ring-hf ")]
    complete = [span for span in spans if not re.search(r"\.\.\.|<", span) and " -" in span]
    for span in complete:
        try:
            parser().parse_args(shlex.split(span)[1:])
        except SystemExit as ended:
            assert (ended.code == 0 and "--help" in span) or span == "ring-hf plan --optimizer", span
    assert len(complete) >= 6


def test_python_and_yaml_blocks_parse():
    languages = [block.language for block in BLOCKS]
    for block in BLOCKS:
        if block.language == "python":
            ast.parse(block.content)
        elif block.language == "yaml":
            assert yaml.safe_load(block.content)
    assert languages.count("python") >= 3


def slugs(text):
    """Return the anchors that GitHub and the site make of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    num_links = 0
    for page, text in PAGES.items():
        for target, anchor in _LINK.findall(text):
            num_links += 1
            path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
            assert path.is_file(), f"{page} links to {target}, which is no file"
            assert not anchor or anchor in slugs(path.read_text()), f"{page} links to {target}#{anchor}"
    assert num_links >= 90


def test_paths_exist():
    paths = {(page, path) for page, text in PAGES.items() for path in _PATH.findall(text)}
    missing = [f"{page}: {path}" for page, path in sorted(paths) if not (ROOT / path).exists()]
    assert missing == []
    assert len(paths) >= 100


def test_names_stand_in_the_files_that_are_named_with_them():
    """As in "`TRANSPORTS` of `ring_hf/geometry/spec.py`"."""
    pairs = [pair for text in PAGES.values() for pair in re.findall(r"`(\w+)`(?: of| in| \()\s*`?([\w/]+\.py)`", text)]
    assert [name for name, path in pairs if name not in (ROOT / path).read_text()] == []
    assert len(pairs) >= 4


def test_the_file_tree_names_existing_files_and_all_packages():
    (tree,) = (b.content for b in BLOCKS if b.page == "docs/architecture.md" and b.language == "text")
    folder, num_files = ROOT, 0
    for line in tree.splitlines():
        name, nested = line.split()[0], line.startswith("  ")
        if not nested:
            folder = ROOT / name if name.endswith("/") else ROOT
        assert (folder / name if nested else ROOT / name).exists(), line
        num_files += 1
    assert num_files >= 30
    packages = {path.parent.name + "/" for path in (ROOT / "ring_hf").glob("*/__init__.py")}
    assert len(packages) >= 10 and packages <= set(tree.split())


def test_names_in_the_text_exist():
    names = {name for text in PAGES.values() for name in re.findall(r"(?<![\w/.])ring_hf((?:\.[A-Za-z_]\w*)+)", text)}
    assert len(names) >= 12
    for name in sorted(names):
        module, attributes = "ring_hf", name[1:].split(".")
        while attributes and importlib.util.find_spec(f"{module}.{attributes[0]}"):
            module += f".{attributes.pop(0)}"
        value = importlib.import_module(module)
        for attribute in attributes:
            value = getattr(value, attribute)


def messages():
    """Return the strings of the sources, one a line; a value that is filled in is a space."""
    lines = [(ROOT / "scripts" / "environment.sh").read_text()]
    for path in [*(ROOT / "ring_hf").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else " " for part in node.values]
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(line.replace("\n", " ") for line in lines)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = PAGES["docs/troubleshooting.md"].split("## No message")[0]
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    # The first row is of messages of Python.
    fragments = [span for cell in cells[1:] for span in _SPAN.findall(cell)]
    sources = messages()
    wrong = [span for span in fragments if not re.search(".*".join(map(re.escape, span.split("..."))), sources)]
    assert wrong == [], "Quote these messages in docs/troubleshooting.md as they read now."
    assert len(fragments) >= 45


def test_every_page_is_in_the_navigation_and_mentions_missing_gpu_runs_once():
    site = (ROOT / "mkdocs.yml").read_text()
    readme = PAGES["README.md"]
    for page, text in PAGES.items():
        if page.startswith("docs/"):
            assert f" {page.removeprefix('docs/')}\n" in site, page
            assert page.startswith("docs/api/") or f"({page}" in readme, f"README.md does not link to {page}"
        assert len(re.findall(r"\brun\s+on\s+a\s+GPU\b", text)) <= 1, page


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run_command(command, env={"NO_MKDOCS_2_WARNING": "1"})
    pages = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) >= 40
    for path, text in pages.items():
        foreign = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?://[^\s>]+", text)
        assert foreign == [], path
    references = [page for page in PAGES if page.startswith("docs/api/")]
    assert len(references) == 8
    for page in references:
        name = Path(page).stem
        module = importlib.import_module(f"ring_hf.{name}")
        selected = re.search(r"members: \[(.*)\]", PAGES[page])
        members = selected[1].split(", ") if selected else module.__all__
        # Constants and what has no docstring are left out, as is a function that its module shadows.
        expected = [
            member
            for member in members
            if callable(getattr(module, member))
            and getattr(module, member).__doc__
            and not (ROOT / "ring_hf" / name / f"{member}.py").exists()
        ]
        site_page = pages[Path(f"api/{name}.html")]
        assert [member for member in expected if f'id="ring_hf.{name}.{member}"' not in site_page] == [], page
        assert len(expected) >= 3
