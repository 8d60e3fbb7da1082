"""The rules of the house: floors import only floors below them, files stay short, nothing but ASCII."""

import ast
import statistics

import pytest

from tests.support.harness import ROOT

PACKAGE = ROOT / "ring_hf"
# What a part of the package may import of the package; the floors from the ground up, then the rooms beside them.
FLOORS = {
    "geometry": set(),
    "costmodel": {"geometry"},
    "kernels": {"geometry"},
    "parallel": {"geometry", "costmodel", "kernels"},
    "memory": set(),
    "hf": {"geometry", "kernels", "parallel", "memory"},
    "data": {"geometry", "hf", "simulate"},
    "evaluation": {"hf", "memory", "parallel"},
    "simulate": {"geometry", "costmodel"},
    "planner": {"geometry", "costmodel", "simulate"},
    "doctor": {"geometry", "costmodel", "kernels", "parallel", "hf", "simulate", "planner"},
    "verify": {
        "geometry",
        "costmodel",
        "kernels",
        "parallel",
        "memory",
        "hf",
        "data",
        "simulate",
        "planner",
        "doctor",
        "testing",
    },
}
# Modules beside the floors: any part may import the ground modules; no part imports the front door.
GROUND = {"exports", "launcher", "text", "version"}
FRONT_DOOR = {"__init__", "cli"}
REFERENCE = {"testing"}  # only `verify` imports it, besides tests and scripts
# The same inside ring_hf/hf: its own files are the ground, which no room is above.
ROOMS = {
    "ground": set(),
    "attention": {"ground"},
    "checks": {"ground", "attention"},
    "collate": {"ground", "checks"},
    "generation": {"ground", "checks"},
    "runtime": {"ground", "attention", "collate"},
    "trainer": {"ground", "attention", "checks", "collate", "runtime"},
}
TRANSFORMERS = {"transformers", "accelerate", "peft", "trl"}
FILES = {str(path.relative_to(ROOT)): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = [
    path
    for folder in ("ring_hf", "recipes", "tests", "scripts")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file()
    and (path.suffix in {".py", ".sh"} or path.parent.name == "scripts")
    and path.suffix not in {".pyc", ".md"}
]


def imports(path):
    """Every module a file imports, also inside functions, as absolute dotted names."""
    package = path.relative_to(ROOT).parent.parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            modules |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return modules


def floor_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def test_every_floor_is_known_and_found():
    floors = {floor_of(path) for path in FILES.values()} - {None}
    assert floors == set(FLOORS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == GROUND | FRONT_DOOR | REFERENCE
    assert len(FILES) >= 30


@pytest.mark.parametrize("name", FILES)
def test_floors_import_only_floors_below(name):
    floor = floor_of(FILES[name])
    used = {module.split(".")[1] for module in imports(FILES[name]) if module.startswith("ring_hf.")}
    if floor is None and FILES[name].stem in GROUND:
        assert not used, f"{name} imports {used}; a ground module imports nothing of ring_hf"
    if floor is None:  # the front door may open every room
        return
    above = {other for other in used & (set(FLOORS) | FRONT_DOOR | REFERENCE) if other != floor} - FLOORS[floor]
    assert not above, f"{name} imports {above}; ring_hf/{floor} may import {FLOORS[floor] or 'no other floor'}"


def room_of(module):
    """The room of `ring_hf.hf.<room or file of the ground>...`."""
    return module.split(".")[2] if module.split(".")[2] in ROOMS else "ground"


HF_FILES = {name: path for name, path in FILES.items() if path.is_relative_to(PACKAGE / "hf")}
del HF_FILES["ring_hf/hf/__init__.py"]  # the front door may open every room


@pytest.mark.parametrize("name", HF_FILES)
def test_rooms_of_hf_import_only_rooms_below(name):
    room = room_of(name.removesuffix(".py").replace("/", "."))
    used = {room_of(module) for module in imports(HF_FILES[name]) if module.count(".") > 1 and "ring_hf.hf." in module}
    above = used - ROOMS[room] - {room}
    assert not above, f"{name} imports {above}; ring_hf/hf/{room} may import {ROOMS[room] or 'no room'}"


def test_files_of_hf_import_each_other_in_no_circle():
    names = {name.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): p for name, p in FILES.items()}
    waiting = {
        name: imports(path) & set(names) - {name} for name, path in names.items() if name.startswith("ring_hf.hf.")
    }
    assert len(waiting) >= 30
    while free := [name for name, needs in waiting.items() if not needs & set(waiting)]:
        for name in free:
            del waiting[name]
    assert waiting == {}


def test_tests_and_scripts_do_not_import_each_other():
    """Tests run scripts as programs; code that both need is in `ring_hf/testing.py` or `ring_hf/verify`."""
    script_names = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    forbidden = {
        "tests": {"scripts"} | script_names,
        "scripts": {"tests"},
        "recipes": {"tests", "scripts"},
        "ring_hf": {"tests", "scripts", "recipes"},
    }
    violations, num_files = [], 0
    for folder, others in forbidden.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            num_files += 1
            for module in sorted(imports(path)):
                if module.split(".")[0] in others:
                    violations.append(f"{path.relative_to(ROOT)} imports {module}")
    assert violations == []
    assert num_files >= 300


@pytest.mark.parametrize("name", FILES)
def test_libraries_stay_on_their_floor(name):
    floor, used = floor_of(FILES[name]), imports(FILES[name])
    libraries = {module.split(".")[0] for module in used}
    if floor not in ("hf", "verify"):
        assert not libraries & TRANSFORMERS, f"{name}: only hf and verify import {libraries & TRANSFORMERS}"
    if floor not in ("parallel", "verify"):
        distributed = {module for module in used if module.startswith("torch.distributed")}
        assert not distributed, f"{name}: only parallel and verify import {distributed}"
    if floor in ("geometry", "costmodel") or (floor is None and FILES[name].stem in GROUND):
        assert not libraries & {"torch", "numpy"}, f"{name} must be pure Python"


def test_files_are_short_and_the_median_is_below_200_lines():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lines) >= 50
    assert {name: n for name, n in lines.items() if n > 400} == {}
    assert statistics.median(lines.values()) < 200


def test_every_file_opens_with_a_paragraph_of_what_it_is_for():
    silent = [name for name, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


# Words that an earlier version of this code had invented, or used as names of whatever a function found.
REFUSED_NAMES = {
    *("lane", "lanes", "mark", "marks", "place", "places", "piece", "pieces", "parcel", "parcels", "trip", "road"),
    *("shelf", "way", "ways", "lever", "levers", "found", "one", "seen", "said", "wanted", "told", "everybody"),
}


def public_functions(body, class_docstring=""):
    """Yield each public function with its docstring and that of its class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, ast.get_docstring(node) or "")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, f"{class_docstring} {ast.get_docstring(node) or ''}"


def test_public_functions_say_what_they_raise():
    silent = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in sorted(ROOT.glob("ring_hf/**/*.py"))
        for function, docstring in public_functions(ast.parse(path.read_text()).body)
        if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(function))
        and "raise" not in docstring.lower()
    ]
    assert not silent


def assigned_names(tree):
    """Names that a module gives to variables, arguments, attributes, functions and classes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def test_names_are_words_of_the_field():
    refused, num_names = [], 0
    for path in SOURCES:
        if path.suffix == ".py":
            for name, line in assigned_names(ast.parse(path.read_text())):
                num_names += 1
                if name.strip("_").lower() in REFUSED_NAMES:
                    refused.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert refused == []
    assert num_names > 10_000


def test_modules_have_names_of_their_own():
    """No basename stands in two packages, and no name that a package exports hides one of its modules."""
    modules = [path for path in FILES.values() if path.name != "__init__.py"]
    names = [path.stem for path in modules]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    for path in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        values = [ast.literal_eval(node.value) for node in tree.body if _assigns_all(node)]
        siblings = {module.stem for module in modules if module.parent == path.parent}
        hidden = {name for exported in values for name in exported} & siblings
        assert not hidden, f"{path.relative_to(ROOT)} exports {hidden}, which are modules, too"


def _assigns_all(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"


def test_sources_are_ascii():
    assert [str(path.relative_to(ROOT)) for path in SOURCES if not path.read_text().isascii()] == []
