"""`ring-hf verify --model`: right models are exact, every planted bug is named with its layer, tokens and cause."""

import json
import math

import pytest
import torch
from arguments import parse
from finetune import ARGUMENTS
from transformers import Trainer

from ring_hf.cli import main, parser
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context
from ring_hf.verify import ModelVerification, model_command, usual_causes, verify_first_steps, verify_model
from ring_hf.verify.model_verification import FirstDifference, WorstDifference, combine, tolerances_for
from ring_hf.verify.module_records import to_tokens
from ring_hf.verify.trainer_verification import VerifyFirstSteps
from tests.engines.conftest import ENVIRONMENTS
from tests.hf.faults import arguments
from tests.hf.models import llama, mistral, rows
from tests.support.harness import ROOT, launch_forked, run_distributed
from tests.verify import planted_bugs
from tests.verify.planted_bugs import of_class, with_layer

LENGTH = 64
# The chunks of two ranks in zigzag: rank 0 has 0..15 and 48..63, rank 1 has 16..47.
MOVED = tuple(range(16, LENGTH))
MODELS = {
    "llama": llama,
    "mistral": mistral,
    "harmless": lambda: of_class(planted_bugs.HarmlessForCausalLM),
    "local-positions": lambda: of_class(planted_bugs.LocalPositionsForCausalLM),
    "local-labels": lambda: of_class(planted_bugs.LocalLabelsForCausalLM),
    "mean-loss": lambda: of_class(planted_bugs.MeanLossForCausalLM),
    "local-attention": lambda: with_layer(planted_bugs.LocalAttention, "self_attn"),
    "dropout": lambda: with_layer(planted_bugs.Dropped, "mlp"),
    "mean-over-tokens": lambda: with_layer(planted_bugs.Centred, "mlp"),
    "neighbours": lambda: with_layer(planted_bugs.Smoothed, "mlp"),
    "lost-gradient": lambda: with_layer(planted_bugs.LostGradient, "mlp", LENGTH),
}


def verify(rank, world_size, name, lengths=(LENGTH, 57), past_refusals=False, collator=None, dtype=torch.float32):
    model = MODELS[name]().to(dtype)
    try:
        return verify_model(model, rows(*lengths), collator=collator and collator(model), past_refusals=past_refusals)
    finally:
        context.reset()


def packed_collator(model):
    return ContextParallelCollator(model, packing=True)


@pytest.mark.parametrize(
    ("name", "lengths", "collator", "dtype"),
    [
        ("llama", (LENGTH, 57), None, torch.float32),
        ("mistral", (LENGTH, 57), None, torch.float32),
        ("mistral", (29, 41, 17), packed_collator, torch.float64),
        ("llama", (LENGTH, 57), None, torch.bfloat16),
    ],
    ids=["llama", "mistral-window", "mistral-packed-fp64", "llama-bf16"],
)
def test_a_right_model_is_exact(name, lengths, collator, dtype):
    result, other = run_distributed(2, verify, name, lengths, False, collator, dtype)
    assert result == other and result.is_exact and result.first_difference is None
    by_quantity = {each.quantity: each for each in result.differences}
    assert list(by_quantity) == ["loss", "logits", "gradients", "grad norm"]
    assert all(0 <= each.value <= each.tolerance for each in by_quantity.values())
    if dtype == torch.float32:  # far below the tolerance, which would pass a model that differs a little
        assert by_quantity["logits"].value < 2e-5 and by_quantity["gradients"].value < 2e-5
    if collator is not None:
        assert "3 documents" in result.setup["batch"]
    assert "verdict: exact" in result.report()


BUGS = [
    ("local-positions", "model", "input position_ids of model.rotary_emb, computed", MOVED, usual_causes.POSITIONS),
    ("local-labels", "the loss", "value", (15, 47), usual_causes.LABELS),
    ("mean-loss", "the loss", "value", (), usual_causes.COUNT),
    (
        "local-attention",
        "model.layers.1.self_attn",
        "input 0 of model.layers.1.self_attn.o_proj, computed",
        MOVED,
        usual_causes.LOCAL_ATTENTION,
    ),
    ("dropout", "model.layers.1.mlp.dropout", "output", None, usual_causes.RANDOM),
    ("mean-over-tokens", "model.layers.1.mlp", None, tuple(range(LENGTH)), usual_causes.MEAN),
    ("neighbours", "model.layers.1.mlp", None, (16, 48), usual_causes.NEIGHBOURS),
    ("lost-gradient", "model.layers.1.post_attention_layernorm", "gradient of weight", (), usual_causes.LOST_GRADIENT),
]


@pytest.mark.parametrize(("name", "module", "tensor", "tokens", "cause"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_named(name, module, tensor, tokens, cause):
    # Rows of different lengths: padding must not hide or add tokens, and ranks have different numbers of targets.
    result, other = run_distributed(2, verify, name, (LENGTH, 57), name in ("local-attention", "dropout"))
    assert result == other and result.verdict == "different"
    first = result.first_difference
    assert first.module == module and first.causes[0] == cause
    assert tensor is None or first.tensor == tensor
    if tokens is None:
        assert set(first.tokens) <= set(range(LENGTH)) and len(first.tokens) > LENGTH // 2
    else:
        assert first.tokens == tokens
    report = result.report()
    assert cause in report and (f" of {module} (" in report or f" in {module} (" in report)


def test_a_collator_that_counts_on_each_rank_is_named():
    result, _ = run_distributed(2, verify, "llama", (LENGTH, LENGTH), False, planted_bugs.LocalPositionsCollator)
    first = result.first_difference
    assert (result.verdict, first.tensor) == ("different", "input position_ids")
    assert first.tokens == MOVED and first.causes == (usual_causes.BATCH_POSITIONS,)


@pytest.mark.parametrize(
    ("name", "message"),
    [("local-attention", "called the attention function 1 times"), ("dropout", "1 dropout modules are active")],
)
def test_a_refusal_is_the_verdict_unless_it_is_to_be_passed(name, message):
    result, other = run_distributed(2, verify, name)
    assert result == other and result.verdict == "refused" and message in result.message
    passed, _ = run_distributed(2, verify, name, (LENGTH, 57), True)
    assert passed.verdict == "different" and len(passed.refusals) == 1 and message in passed.refusals[0]
    assert f"refused in training: {passed.refusals[0]}" in passed.report()


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_models_are_verified_on_sharded_weights(engine, tmp_path):
    path = tmp_path / "results.json"
    launch_forked(["tests/verify/engine_script.py", str(path), engine], 2, ENVIRONMENTS.get(engine.split("-")[0]))
    right, wrong = map(ModelVerification.from_json, json.loads(path.read_text()).values())
    assert (
        right.is_exact and f"engine {engine}" in right.setup["ranks"] and "22,688 parameters" in right.setup["model"]
    )
    assert all(each.value <= each.tolerance for each in right.differences)
    first = wrong.first_difference
    assert wrong.verdict == "different" and first.module == "model.layers.1.self_attn"
    assert first.tokens == MOVED and first.causes[0] == usual_causes.LOCAL_ATTENTION


def train(rank, world_size, name, num_steps, max_length):
    """Return the losses of a training, or the error."""
    model = MODELS[name]()
    args = arguments(ContextParallelConfig(context_parallel_size=2), logging_steps=1)
    trainer = Trainer(model, args, train_dataset=rows(31, 22, 17, 30), data_collator=ContextParallelCollator(model))
    if num_steps:
        verify_first_steps(trainer, num_steps, max_length)
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    finally:
        context.reset()
    verified = [c.results for c in trainer.callback_handler.callbacks if isinstance(c, VerifyFirstSteps)]
    losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses, [result.verdict for results in verified for result in results]


def test_verified_steps_change_no_number_of_the_training():
    """Of a model that also takes a trial step, which replaces the training step of the Trainer as well."""
    (losses, verdicts), _ = run_distributed(2, train, "harmless", 0, None)
    assert len(losses) == 2 and verdicts == []
    for num_steps, max_length in ((2, None), (1, 20)):
        result, _ = run_distributed(2, train, "harmless", num_steps, max_length)
        assert result == (losses, ["exact"] * num_steps)


def test_a_verified_step_that_differs_ends_the_training():
    for message in run_distributed(2, train, "local-labels", 1, 24):
        assert "the model on shards is not that of one process" in message and usual_causes.LABELS in message
        assert "2 rows of 24 tokens" in message


def test_the_command_verifies_a_saved_model(tmp_path, capfd):
    mistral("sdpa").save_pretrained(tmp_path / "model")
    path = tmp_path / "result.json"
    words = ["verify", "--model", str(tmp_path / "model"), "--cp", "2", "--length", "48", "--json", str(path)]
    assert main(words) == 0
    output = capfd.readouterr().out
    result = ModelVerification.from_json(json.loads(path.read_text()))
    assert result.is_exact and result.report() in output
    assert "2 rows of 48 tokens" in result.setup["batch"] and "2 share each row (zigzag" in result.setup["ranks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "x", "--cp", "1"], "at least 2 processes"),
        (["--model", "x", "--rows", "0"], "--rows 0 must be at least 1"),
        (["--model", "x", "--quick"], "--quick is for the machine"),
        (["--cp", "2"], "--cp is for a model"),
        (["--config", "x.yaml", "--engine", "zero3"], "--engine zero3 is not for --config"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(words, message, capsys):
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_verified_by_its_recipe(tmp_path):
    words = [
        "verify",
        "--config",
        "configs/finetune.yaml",
        "--model",
        "m",
        "--data",
        "a.txt",
        "b.txt",
        "--length",
        "1K",
    ]
    options = parser().parse_args(words)
    script, *rest = model_command.recipe_command(options, 2, "cpu", tmp_path / "verification.json")
    assert script == str(ROOT / "recipes" / "finetune.py")
    model_args, data_args, parallel_args, _, run_args, training_args = parse(ARGUMENTS, "", rest, use_cpu=True)
    assert model_args.model == "m" and model_args.rope_theta == 1e5 and data_args.max_length == 1024
    assert [source["source"] for source in data_args.data] == ["a.txt", "b.txt"]
    assert parallel_args.context_parallel_size == 2 and training_args.output_dir == str(tmp_path)
    assert (run_args.verify_steps, run_args.verify_only) == (1, True)


def test_tokens_are_the_dim_of_their_length():
    shapes = {
        (2, 5): (2, 5, 1),
        (1, 5, 3): (1, 5, 3),
        (2, 4, 5, 3): (2, 5, 12),
        (2, 7, 5): (2, 5, 7),
        (10, 3): (2, 5, 3),
        (5,): (1, 5, 1),
    }
    for shape, expected in shapes.items():
        assert to_tokens(torch.zeros(shape), 2, 5).shape == expected
    x = torch.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    assert to_tokens(x, 2, 5)[1, 2].tolist() == x[1, :, 2].flatten().tolist()
    assert to_tokens(torch.zeros(3, 7), 2, 5) is None and to_tokens(torch.zeros(()), 2, 5) is None


def test_results_survive_json_and_combine_to_the_first_that_differs():
    first = FirstDifference("m", "C", "output", 1.0, (1, 2), "1..2", ("a", "b"))
    exact = ModelVerification("exact", "", {"a": "b"}, (WorstDifference("loss", 1e-7, 1e-5, ""),))
    different = ModelVerification("different", "", {}, (WorstDifference("loss", math.inf, 1e-5, ""),), first)
    assert ModelVerification.from_json(json.loads(json.dumps(different.to_json()))) == different
    combined = combine([exact, different])
    assert combined.first_difference == first and combined.differences[0].value == math.inf
    assert combine([exact, exact]).is_exact and not WorstDifference("loss", math.nan, 1.0, "").is_rounding
    assert tolerances_for(torch.float64).logits < tolerances_for(torch.float32).logits
