"""The Trainer with two processes that share sequences and every lever pulled, against one process with none."""

import json

import pytest

from tests.harness import launch_forked
from tests.memory.train_script import CASES, train
from tests.trainer.compare import assert_same_run


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "results.json"
    launch_forked(["tests/memory/train_script.py", str(path)], 2)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_training_with_levers_follows_one_process_without(launched, tmp_path, name):
    reference = train(CASES[name].reference(), tmp_path)
    found = launched[name]
    assert_same_run(name, found, reference)
    assert found["models left"] == 0
    if "evaluation" in reference:
        assert found["evaluation"] == pytest.approx(reference["evaluation"], rel=2e-5)
        assert found["loss alone"] == pytest.approx(reference["evaluation"][0], rel=1e-5)
