"""What files and configurations may do: no code of theirs runs, nothing leaves the machine at import, and files are
written where the user said."""

import ast
import importlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ring_hf.data.run_options import read_yaml
from ring_hf.hf import find_damage
from ring_hf.hf.pretrained import load_pretrained
from tests.support.harness import ROOT, run_command

SOURCES = sorted(path for folder in ("ring_hf", "recipes", "scripts") for path in (ROOT / folder).rglob("*.py"))
REFUSED_CALLS = {
    *(
        "pickle.load",
        "pickle.loads",
        "marshal.loads",
        "joblib.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("eval", "exec", "os.system", "os.popen", "torch.hub.load"),
}


def find_unsafe_calls(source: str) -> list[str]:
    """Return calls that run code of the data they read, and arguments that allow it."""
    unsafe = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {item.arg: ast.unparse(item.value) for item in node.keywords}
        if name in REFUSED_CALLS or (name == "torch.load" and keywords.get("weights_only") != "True"):
            unsafe.append(name)
        if keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
            unsafe.append(f"{name} with {'shell' if 'shell' in keywords else 'allow_pickle'}")
        if keywords.get("trust_remote_code", "False") == "True":
            unsafe.append(f"{name} with trust_remote_code")
    return unsafe


@pytest.mark.parametrize(
    "source",
    [
        "pickle.loads(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_search_detects_unsafe_calls(source):
    assert len(find_unsafe_calls(source)) == 1


def test_sources_make_no_unsafe_calls():
    unsafe = {str(path.relative_to(ROOT)): find_unsafe_calls(path.read_text()) for path in SOURCES}
    assert len(unsafe) > 200
    assert {name: calls for name, calls in unsafe.items() if calls} == {}
    assert sum("torch.load(" in path.read_text() for path in SOURCES) >= 2


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_the_attack_works_where_nothing_prevents_it(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "attacked")))
    assert (tmp_path / "attacked").exists()


def write_model_folder(folder: Path, **config) -> None:
    LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_pickled_weights_and_optimizer_states_run_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    write_model_folder(tmp_path)
    attack = Attack(tmp_path / "attacked")
    torch.save({"lm_head.weight": attack}, tmp_path / "pytorch_model.bin")
    torch.save({"state": attack}, tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_pretrained(AutoModelForCausalLM, "model", str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")
    assert find_damage(tmp_path) is None
    load_optimizer = importlib.import_module("run_start").load_optimizer
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        load_optimizer(_TrainerStandIn(), tmp_path)
    assert not (tmp_path / "attacked").exists()


class _TrainerStandIn:
    """What `load_optimizer` reads of a Trainer under DDP."""

    class accelerator:
        distributed_type = "MULTI_CPU"

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def test_code_of_a_model_folder_is_not_run(tmp_path):
    code = f"from pathlib import Path\nPath({str(tmp_path / 'attacked')!r}).touch()\n"
    code += "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'attack'\n"
    write_model_folder(tmp_path, model_type="attack", auto_map={"AutoConfig": "attack.Config"})
    (tmp_path / "attack.py").write_text(code)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(AutoConfig, "model", str(tmp_path))
    assert not (tmp_path / "attacked").exists()


def test_a_configuration_runs_no_code(tmp_path):
    attack = f"model: !!python/object/apply:os.system ['touch {tmp_path / 'attacked'}']\n"
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        read_yaml("run.yaml", attack)
    config = tmp_path / "run.yaml"
    config.write_text(attack)
    command = [sys.executable, "recipes/finetune.py", str(config)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode != 0 and "YAML" in done.stderr + done.stdout, done.stderr[-2000:]
    assert not (tmp_path / "attacked").exists()


def test_importing_every_module_opens_no_connection():
    code = """
        import importlib, pkgutil, socket
        attempts = []

        def refuse(name):
            def call(*args, **kwargs):
                attempts.append((name, args[-1:]))
                raise OSError("no network")
            return call

        for name in ("create_connection", "getaddrinfo", "gethostbyname"):
            setattr(socket, name, refuse(name))
        socket.socket.connect = refuse("connect")
        try:
            socket.create_connection(("127.0.0.1", 1))
        except OSError:
            assert attempts.pop()
        import ring_hf
        names = [module.name for module in pkgutil.walk_packages(ring_hf.__path__, "ring_hf.")]
        for name in names:
            importlib.import_module(name)
        print(len(names), attempts)
    """
    environment = {"HF_HUB_OFFLINE": "0"}
    count, attempts = run_command([sys.executable, "-c", textwrap.dedent(code)], environment).stdout.split(maxsplit=1)
    assert int(count) > 150 and attempts.strip() == "[]"


def test_training_writes_into_the_output_folder_only(tmp_path):
    """Started in an empty folder, with an empty home: files appear in the output folder, and only the user may read
    them where the user's umask says so."""
    folders = {name: tmp_path / name for name in ("output", "home", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train_and_exit.py"), str(folders["output"])]
    environment = {**os.environ, "HOME": str(folders["home"]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = {name: value for name, value in environment.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(command, cwd=folders["cwd"], env=environment, capture_output=True, text=True, umask=0o077)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folders["output"] / "model.safetensors").exists()
    assert [str(path) for name in ("home", "cwd") for path in folders[name].rglob("*") if path.is_file()] == []
    for path in [folders["output"], *folders["output"].rglob("*")]:
        assert path == folders["output"] or path.stat().st_mode & 0o077 == 0, path
