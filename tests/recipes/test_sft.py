"""The recipe for conversations as a user starts it: two processes give the numbers of one, whatever is trained, and
plain Transformers loads the result."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from adapters import quantization_of
from arguments import MemoryArguments
from conversation_data import load_examples, training_template
from sft import ARGUMENTS, check_weighting
from sft_arguments import AdapterArguments, ConversationArguments
from training import parse_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from ring_hf.cli import main
from ring_hf.data import pack_documents
from tests.data.test_conversations import tokenizer
from tests.recipes.sft_runs import CASES, CHECKPOINT
from tests.support.harness import launch_forked
from tests.trainer.sft_script import TEMPLATE, completions, conversations

STEPS = 6
RUN = {
    "data": "{folder}/chat.jsonl",
    "assistant_only_loss": True,
    "max_length": 96,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_steps": CHECKPOINT,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": STEPS,
    "disable_tqdm": True,
    "report_to": "none",
}
NEW_MODEL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
NEW_MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
SKIPPED = {"runtime", "per_second", "peak_memory", "epoch", "step", "learning_rate", "total_flos"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data and the runs of one process (`1`) and of two (`2`)."""
    folder = tmp_path_factory.mktemp("sft")
    for name, rows in (("chat", conversations(0, 80)), ("completions", completions(0, 80))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "chat.jinja").write_text(TEMPLATE)
    run = {**RUN, "data": RUN["data"].format(folder=folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump({**run, "model_config": NEW_MODEL, "tokenizer": "bytes"}))
    (folder / "base.yaml").write_text(yaml.safe_dump(run))
    outputs = {}
    for size in (1, 2):
        (folder / str(size)).mkdir()
        command = ["tests/recipes/sft_runs.py", str(folder / str(size)), str(folder / "1" / "full")]
        outputs[size] = launch_forked(command, size)
    (folder / "output").write_text(outputs[2])
    return folder


def logs_of(folder, size, name):
    logs = json.loads((folder / str(size) / name / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in log.items() if not any(text in k for text in SKIPPED)} for log in logs]


@pytest.mark.parametrize("name", [name for name in CASES if name != "continued"])
def test_two_processes_give_the_numbers_of_one(folder, name):
    run, reference = logs_of(folder, 2, name), logs_of(folder, 1, name)
    losses = [log["loss"] for log in reference if "loss" in log]
    assert len(losses) == STEPS and any("eval_loss" in log for log in reference)
    tolerance = 2e-3 if "4 bits" in name else 1e-5  # its adapter is in bf16
    pairs = [(a["loss"], b["loss"]) for a, b in zip(run, reference, strict=True) if "loss" in a]
    print(f"{name}: worst loss {max(abs(a - b) for a, b in pairs):.1e}")
    for log, other in zip(run, reference, strict=True):
        assert log == pytest.approx(other, rel=10 * tolerance if "grad_norm" in other else tolerance)


def test_a_killed_run_continues_from_its_last_checkpoint(folder):
    for size in (1, 2):
        run, reference = logs_of(folder, size, "continued"), logs_of(folder, size, "full")
        losses = [[log["loss"] for log in logs if "loss" in log] for logs in (run, reference)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-7) and len(losses[0]) == STEPS


def test_examples_weigh_the_same_only_if_asked(folder):
    weighted, plain = (logs_of(folder, 1, name)[0] for name in ("examples", "tokens"))
    assert abs(weighted["loss"] - plain["loss"]) > 1e-3


def test_plain_transformers_loads_models_and_adapters(folder):
    tokens = torch.arange(40)[None]
    run = folder / "2"
    full = AutoModelForCausalLM.from_pretrained(run / "full").eval()
    assert full.config._attn_implementation == "sdpa" and full.config.max_position_embeddings == 96
    assert full.config.use_cache and AutoTokenizer.from_pretrained(run / "full").chat_template == TEMPLATE
    merged = AutoModelForCausalLM.from_pretrained(run / "adapter" / "merged").eval()
    assert merged.config.rope_parameters["rope_theta"] == 20000 and type(merged).__name__ == "LlamaForCausalLM"
    base = AutoModelForCausalLM.from_pretrained(folder / "1" / "full", config=merged.config).eval()
    base.load_adapter(run / "adapter")
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, base(tokens).logits, atol=1e-5)
        assert not torch.allclose(merged(tokens).logits, full(tokens).logits, atol=1e-2)


def test_long_examples_are_dropped_or_truncated_and_counted(folder, capsys, tmp_path):
    def examples(overlong, **settings):
        options = [
            f"--{key}={value}" for key, value in {"heldout_fraction": 0, "overlong": overlong, **settings}.items()
        ]
        path = ["--data", str(folder / "completions.jsonl"), "--format", "prompt_completion"]
        arguments = parse_run(ARGUMENTS, "", [str(folder / "run.yaml"), *path, *options, f"--output_dir={tmp_path}"])
        return load_examples(arguments[1], arguments[-1], tokenizer())[0], capsys.readouterr().out

    lengths = [len(tokenizer()(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in completions(0, 80)]
    num_long = sum(length > 60 for length in lengths)
    assert 5 < num_long < 75
    dropped, output = examples("drop", max_length=60)
    assert len(dropped) == 80 - num_long and max(map(len, dropped["input_ids"])) <= 60
    assert (
        f"completions: {num_long} of 80 examples ({num_long / 0.8:.1f} %) have more than 60 tokens and are" in output
    )
    share = 100 * sum(length for length in lengths if length <= 60) / sum(lengths)
    assert f"dropped (overlong); {share:.1f} % of the tokens are left." in output
    truncated, output = examples("truncate", max_length=60)
    assert "have more than 60 tokens and are truncated (overlong)" in output
    without_loss = 80 - len(truncated)
    assert without_loss and f"{without_loss} of 80 examples have no token with a loss (left) and are left" in output
    assert max(map(len, truncated["input_ids"])) == 60


def test_a_mixture_is_read_as_the_report_says(folder, tmp_path, capsys):
    """Two formats with weights, a bad row skipped: `ring-hf data` counts what the recipe trains on."""
    bad = [*map(json.dumps, completions(0, 40)), '{"prompt": "p"}']
    (tmp_path / "completions.jsonl").write_text("\n".join(bad))
    sources = [
        {"source": f"{folder}/chat.jsonl", "weight": 0.7, "max_length": 120},
        {"source": f"{tmp_path}/completions.jsonl", "format": "prompt_completion", "weight": 0.3, "errors": "skip"},
    ]
    run = {**yaml.safe_load((folder / "run.yaml").read_text()), "data": sources, "max_length": 200}
    run |= {"heldout_fraction": 0, "packing": True, "chat_template_path": str(folder / "chat.jinja")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "output_dir": str(tmp_path)}))
    arguments = parse_run(ARGUMENTS, "", [str(tmp_path / "run.yaml")])
    examples, _ = load_examples(arguments[1], arguments[-1], tokenizer())
    assert main(["data", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    chat, answers = report["sources"]
    assert chat["share"] == pytest.approx(0.7, abs=0.02) and (chat["format"], chat["overlong"]) == ("messages", "drop")
    assert (answers["documents"], answers["format"]) == (40, "prompt_completion") and chat["outcomes"]["drop"][
        "dropped"
    ]
    lengths = [len(row) for row in examples["input_ids"]]
    assert (len(lengths), sum(lengths)) == (report["spans"], report["tokens"])
    assert sum(int((row[1:] != -100).sum()) for row in examples["labels"]) == report["targets"]
    assert report["packing"] == "best_fit" and report["sequences"] == len(pack_documents(examples, 200))
    assert "chat: " in capsys.readouterr().out


REFUSED = {
    "data": ([], {"data": None}, "data is missing. Name a file of conversations"),
    "cut": ([], {"overlong": "cut"}, "overlong='cut': choose one of drop, truncate"),
    "weighting": ([], {"loss_weighting": "rows"}, "loss_weighting='rows' is unknown"),
    "format": ([], {"format": "message"}, r"format unknown: 'message' \(did you mean messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_the_data_are_refused(name):
    _, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ConversationArguments(**{"data": "chat.jsonl", **settings})


def test_settings_of_adapters_are_refused():
    with pytest.raises(ValueError, match=r"use_dora=True needs an adapter\. Set use_peft: true"):
        AdapterArguments(use_dora=True)
    with pytest.raises(ValueError, match="merge_adapter=True would add the adapter to weights of few bits"):
        AdapterArguments(use_peft=True, merge_adapter=True, load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_4bit and quantization_config are both given"):
        AdapterArguments(use_peft=True, load_in_4bit=True, quantization_config="{load_in_8bit: true}")
    model_args = SimpleNamespace(rope_theta=1e6, rope_parameters=None, model="m")
    with pytest.raises(
        ValueError, match=r"rope_theta=1000000.0 with use_peft: an adapter is loaded into the model as"
    ):
        AdapterArguments(use_peft=True).check_model(model_args)
    AdapterArguments(use_peft=True, merge_adapter=True).check_model(model_args)
    with pytest.raises(ValueError, match="use_peft with model_config: an adapter needs a model"):
        AdapterArguments(use_peft=True).check_model(SimpleNamespace(rope_theta=None, rope_parameters=None, model=None))
    quantization = quantization_of(AdapterArguments(use_peft=True, load_in_4bit=True), "bfloat16")
    assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_compute_dtype == torch.bfloat16


def test_weights_of_examples_and_settings_of_trl_are_refused():
    plain, memory_args = SimpleNamespace(loss_weighting="tokens"), MemoryArguments(loss_block="2048")
    with pytest.raises(ValueError, match="loss_block=2048: TRL's SFTTrainer takes the loss in tiles by itself"):
        check_weighting(plain, memory_args, SimpleNamespace(loss_type="nll"))
    weighted = SimpleNamespace(loss_weighting="examples")
    with pytest.raises(ValueError, match="loss_weighting=examples with loss_type='dft': weights are for nll only"):
        check_weighting(weighted, None, SimpleNamespace(loss_type="dft"))
    with pytest.raises(ValueError, match="packing_strategy='wrapped': examples stay whole only with bfd"):
        check_weighting(weighted, None, SimpleNamespace(loss_type="nll", packing=True, packing_strategy="wrapped"))


def test_templates_come_from_a_file_or_from_trl_or_are_refused(tmp_path):
    from trl.chat_template_utils import qwen2_5_chat_template, qwen2_5_training_chat_template

    def template_of(template, path=None, only=True):
        chat_tokenizer = tokenizer(template)
        arguments = SimpleNamespace(chat_template_path=path, assistant_only_loss=only)
        return training_template(chat_tokenizer, arguments), chat_tokenizer.chat_template

    assert template_of(qwen2_5_chat_template) == (qwen2_5_training_chat_template, qwen2_5_chat_template)
    assert template_of(TEMPLATE) == (None, TEMPLATE) and template_of("plain", only=False) == (None, "plain")
    with pytest.raises(ValueError, match=r"no \{% generation %\} marks.*set chat_template to that file"):
        template_of("{{ messages }}")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert template_of("plain", str(tmp_path / "chat.jinja")) == (None, TEMPLATE)
    (tmp_path / "bare.jinja").write_text("bare")
    with pytest.raises(ValueError, match=r"no \{% generation %\} marks"):
        template_of("plain", str(tmp_path / "bare.jinja"))
    with pytest.raises(ValueError, match=r"chat_template_path='organisation/model' must be a .jinja or .j2 file here"):
        template_of("plain", "organisation/model")
