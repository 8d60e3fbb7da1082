"""The Trainer with two processes that share sequences, with memory options, against one process without any."""

import json

import pytest

from tests.memory.train_script import CASES, train
from tests.support.harness import launch_forked
from tests.trainer.compare import assert_same_run


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "results.json"
    launch_forked(["tests/memory/train_script.py", str(path)], 2)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_training_with_options_follows_one_process_without(launched, tmp_path, name):
    reference = train(CASES[name].reference(), tmp_path)
    actual = launched[name]
    assert_same_run(name, actual, reference)
    assert actual["models left"] == 0
    if "evaluation" in reference:
        assert actual["evaluation"] == pytest.approx(reference["evaluation"], rel=2e-5)
        assert actual["loss alone"] == pytest.approx(reference["evaluation"][0], rel=1e-5)
