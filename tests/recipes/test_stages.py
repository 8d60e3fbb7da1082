"""What a file of stages may say: budgets, batches, launch lines, and every mistake with its way out."""

import pytest
import yaml
from budget import Batch, count_steps, make_batch, parse_budget
from launch_line import read_launch
from run_log import peak_flops, read_rows
from run_start import check_optimizer_state
from stages import read_stages, recipe_types
from transformers import TrainingArguments

from tests.support.harness import ROOT


def test_budgets_are_decimal_and_batches_whole_sequences():
    assert [parse_budget(text) for text in ("4.8B", "500M", "100K", 7, "1T")] == [
        4_800_000_000,
        500_000_000,
        100_000,
        7,
        10**12,
    ]
    batch = make_batch("4M", 2**16, 1, 8, 1)
    assert batch == Batch(2**16, 1, 8, 8) and batch.num_tokens == 2**22
    assert count_steps("50B", batch) == 11_921 and count_steps(2**22, batch) == 1
    assert make_batch(None, 64, 2, 3, 4).num_tokens == 64 * 2 * 3 * 4
    with pytest.raises(ValueError, match=r"no multiple of the 524,288 tokens of .* 8 data-parallel replicas. Set it"):
        make_batch("4100K", 2**16, 1, 8, 1)
    for wrong in ("4.8X", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=r"is not a number of tokens. Write 4800000000, 4.8B"):
            parse_budget(wrong)


def test_launch_lines_say_how_many_processes_and_which_engine(monkeypatch):
    monkeypatch.chdir(ROOT)
    fsdp = read_launch("accelerate launch --config_file configs/accelerate/fsdp2_8gpu.yaml")
    assert (fsdp.num_processes, fsdp.engine, fsdp.machine_rank) == (8, "FSDP", 0)
    zero = "accelerate launch --config_file configs/accelerate/zero3_8gpu.yaml --offload_optimizer_device cpu"
    assert read_launch(zero).settings["zero_stage"] == 3
    assert read_launch(zero).settings["offload_optimizer_device"] == "cpu"
    monkeypatch.setenv("RANK_OF_MACHINE", "3")
    several = "accelerate launch --config_file configs/accelerate/hsdp_4x8gpu.yaml --machine_rank $RANK_OF_MACHINE"
    assert (read_launch(several).machine_rank, read_launch(several).num_machines) == (3, 4)
    torchrun = read_launch("torchrun --nnodes 2 --nproc_per_node 8 --node_rank ${NO_SUCH_RANK:-1}")
    assert (torchrun.num_processes, torchrun.machine_rank, torchrun.num_machines) == (16, 1, 2)
    assert torchrun.command("a.py", "b.yaml")[1:4] == ["-m", "torch.distributed.run", "--nnodes"]
    assert fsdp.command("a.py")[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert read_launch("python").num_processes == 1 and read_launch("mine --x", 6).num_processes == 6
    assert read_launch("mine --x", 6).command("a.py") == ["mine", "--x", "a.py"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "launch is empty"),
        ("srun", "does not say how many processes it starts"),
        ("accelerate launch", "does not say how many processes"),
        ("accelerate launch --config_file absent.yaml", "there is no file absent.yaml here"),
        ("torchrun --nnodes 1:4 --nproc_per_node 8", "lets the number of machines change"),
        ("python $NO_SUCH_VARIABLE", r"variable NO_SUCH_VARIABLE is not set.*\$\{NO_SUCH_VARIABLE:-0\}"),
    ],
)
def test_a_launch_line_that_says_too_little_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        read_launch(line)


BASE = {
    "model_config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1},
    "tokenizer": "bytes",
    "per_device_train_batch_size": 1,
    "save_steps": 2,
}
ZERO = f"accelerate launch --config_file {ROOT}/configs/accelerate/zero3_8gpu.yaml"
SFT = {"recipe": "sft", "data": "chat.jsonl"}
FIRST = {"name": "a", "max_length": 64, "budget": {"steps": 2}}


def stages_of(tmp_path, *stages, **top):
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump({**BASE, "output_dir": str(tmp_path), **top, "stages": list(stages)}))
    return read_stages(str(path), {})[0]


def test_a_stage_starts_from_the_last_one_with_its_own_values(tmp_path):
    second = {"name": "b", "max_length": "1K", "budget": {"tokens": "10K"}, "tokens_per_batch": "2K"}
    stages = stages_of(tmp_path, FIRST, {**second, "optimizer_state": "keep", "learning_rate": 1e-4})
    assert [stage.folder.name for stage in stages] == ["stage-01-a", "stage-02-b"]
    assert stages[1].values["model"] == str(stages[0].folder) and stages[1].values["model_config"] is None
    assert (stages[1].num_steps, stages[1].batch.accumulation, stages[1].values["max_steps"]) == (5, 2, 5)
    assert stages[1].values["learning_rate"] == 1e-4 and "learning_rate" not in stages[0].values
    assert stages[0].num_tokens == 128 and stages[0].rope is None


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"max_lenght": 9}, r"stage 2 \(b\): unknown in a stage: 'max_lenght' \(did you mean max_length"),
        ({"budget": {"epochs": 3}}, r"budget=\{'epochs': 3\} must be \{tokens: 4.8B\} or \{steps: 1200\}"),
        ({"budget": {"steps": 0}}, "steps must be a whole number of at least 1"),
        ({"rope_theta": 5.0}, "rope_theta follows from rope. Leave it out"),
        ({"max_steps": 5}, "max_steps follows from budget"),
        ({"name": "a"}, "name='a' must be letters.*unlike those before it"),
        ({"name": "a/b"}, "name='a/b' must be letters"),
        ({"recipe": "perplexity"}, r"recipe='perplexity' is no training recipe. Choose one of .*finetune"),
        ({"optimizer_state": "reset"}, "optimizer_state='reset' must be fresh or keep"),
        ({"context_parallel_size": 2}, "context_parallel_size=2 does not divide 1 processes"),
        ({"tokens_per_batch": 100}, "no multiple of the 64 tokens"),
        ({"tokens_per_batch": "1K", "gradient_accumulation_steps": 2}, "tokens_per_batch sets gradient_accumulation"),
        ({"rope": {"rope_type": "dynamic"}}, "Use rope_type ntk"),
        ({"until_short_perplexity_within": 0.1}, "Set perplexity_lengths, eval_strategy: steps and eval_steps"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"memory_attention": "some"}, "memory_attention|attention='some'"),
        ({**SFT, "loss_block": 64}, r"stage 2 \(b\): loss_block=64: TRL's SFTTrainer takes the loss in tiles"),
        (
            {**SFT, "perplexity_lengths": [64]},
            r"plain text, which this recipe does not read. Set perplexity_lengths: \[",
        ),
        ({**SFT, "use_peft": True, "rope": {"rope_theta": 1e5}}, "with use_peft: .* Set merge_adapter: true"),
    ],
)
def test_mistakes_in_a_stage_are_refused(tmp_path, second, message):
    with pytest.raises(ValueError, match=message):
        stages_of(tmp_path, FIRST, {**FIRST, "name": "b", **second})


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"optimizer_state": "keep"}, {}, "needs a stage before it"),
        ({"save_strategy": "no"}, {"optimizer_state": "keep"}, "'save_strategy': 'no'.*Set save_strategy: steps"),
        ({"save_only_model": True}, {"optimizer_state": "keep"}, "save_only_model: false"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
            {"optimizer_state": "keep", "load_best_model_at_end": False},
            "may end with the weights of an earlier step",
        ),
        (
            {"launch": f"accelerate launch --config_file {ROOT}/configs/accelerate/fsdp2_8gpu.yaml"},
            {"optimizer_state": "keep", "launch": "python"},
            "stage 1 runs on FSDP, this one on DDP",
        ),
        (
            {"launch": ZERO},
            {"optimizer_state": "keep", "launch": f"{ZERO} --num_processes 4"},
            "DeepSpeed saves a shard for each of 8 processes, and this stage has 4",
        ),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused(tmp_path, first, second, message):
    with pytest.raises(ValueError, match=message):
        stages_of(tmp_path, {**FIRST, **first}, {**FIRST, "name": "b", **second})


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no optimizer state. Save checkpoints with it"):
        check_optimizer_state(tmp_path, "DDP")
    (tmp_path / "optimizer.pt").touch()
    check_optimizer_state(tmp_path, "DDP")
    with pytest.raises(ValueError, match=r"was saved by DDP, and FSDP runs here.*optimizer_state: fresh"):
        check_optimizer_state(tmp_path, "FSDP")


def test_recipes_end_with_the_arguments_of_a_trainer():
    assert issubclass(recipe_types("finetune")[-1], TrainingArguments)


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_the_peak_of_an_unknown_device_is_not_invented():
    device = TrainingArguments(use_cpu=True).device
    assert peak_flops(device, None) is None and peak_flops(device, 2.0) == 2e12
