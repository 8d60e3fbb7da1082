"""Checkpoints: a resumed run equals an uninterrupted one, and the saved model does not need this package."""

import json
import sys

import pytest

from tests.support.harness import run_command
from tests.trainer.cases import STEPS
from tests.trainer.compare import assert_same_run

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
assert "ring_hf" not in sys.modules
print(json.dumps([model.config._attn_implementation, logits.double().square().sum().item()]))
"""

pytestmark = pytest.mark.timeout(900)  # the first test of a world size waits for its launch


def test_resuming_in_the_middle_equals_an_uninterrupted_run(launches):
    run = launches.results(2)["cp2-zigzag-resume"]
    half = STEPS // 2
    whole = {key: run[key][half:] for key in ("loss", "grad_norm")}
    resumed = {key: values[-half:] for key, values in run["resumed"].items()}
    assert_same_run("resumed", resumed, whole)


def test_saved_model_runs_in_plain_transformers(launches, tmp_path):
    run = launches.results(2)["cp2-zigzag-resume"]
    saved = launches.path(2) / "saved"
    result = run_command([sys.executable, "-c", PLAIN, str(saved), json.dumps(run["tokens"])], {"PYTHONPATH": ""})
    attention, logits_sum = json.loads(result.stdout.strip().splitlines()[-1])
    print(f"plain Transformers with {attention}: sum of squared logits {logits_sum}, here {run['logits_sum']}")
    assert attention == "sdpa" and logits_sum == pytest.approx(run["logits_sum"], rel=1e-6)
