"""The installed package is found wherever a script lies."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.support.harness import ROOT


def test_a_clone_beside_a_script_does_not_hide_the_package(tmp_path):
    """Python takes a folder without `__init__.py` for a package only if no entry of the path has a real one."""
    clone = tmp_path / "ring_hf" / "ring_hf"
    clone.mkdir(parents=True)
    (clone / "__init__.py").write_text("")
    script = tmp_path / "train.py"
    script.write_text("import importlib.util\nprint(importlib.util.find_spec('ring_hf').origin)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    origin = Path(done.stdout.strip())
    assert origin.parts[-2:] == ("ring_hf", "__init__.py") and tmp_path not in origin.parents
    assert "hf" in {path.name for path in origin.parent.iterdir()}


def test_editable_installations_put_the_repository_on_the_path():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}
    assert settings["packages"]["find"]["include"] == ["ring_hf*"]
