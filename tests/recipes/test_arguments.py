"""One parser for all recipes: YAML, then the command line, and nothing that is not a key."""

import pytest
from arguments import MemoryArguments, ModelArguments, ParallelArguments, PerplexityArguments, parse
from finetune import ARGUMENTS
from loading import load_tokenizer, set_positions
from transformers import AutoConfig

from ring_hf.memory import MemoryConfig


def parse_run(*argv, yaml=None, tmp_path=None, types=ARGUMENTS):
    if yaml is not None:
        path = tmp_path / "run.yaml"
        path.write_text(yaml)
        argv = (str(path), *argv)
    return parse(types, "a recipe", list(argv), use_cpu=True)


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    yaml = "model: a\nmax_length: 64\nlearning_rate: 1e-3\npacking: stream\nmask_boundaries: false\n"
    model, data, parallel, memory, _, training = parse_run(
        "--max_length", "128", "--packing=separate", yaml=yaml, tmp_path=tmp_path
    )
    assert (model.model, model.attn_implementation) == ("a", "ring_zigzag")
    assert (data.max_length, data.packing, data.mask_boundaries) == (128, "separate", False)
    assert training.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as a string
    assert training.use_cpu
    assert parallel == ParallelArguments()
    assert memory == MemoryArguments() and memory.config() == MemoryConfig("none", None, None, None)
    yaml += "memory_attention: save\nmemory_offload: all\nffn_block: 512\n"
    memory = parse_run("--loss_block", "auto", "--memory_offload", "layers", yaml=yaml, tmp_path=tmp_path)[3]
    assert memory.config() == MemoryConfig("save", "layers", 512, "auto")


def test_mappings_come_from_yaml_or_as_text(tmp_path):
    yaml = "model_config:\n  model_type: llama\n  hidden_size: 8\n"
    assert parse_run(yaml=yaml, tmp_path=tmp_path)[0].model_config == {"model_type": "llama", "hidden_size": 8}
    text = '{"model_type": "llama", "hidden_size": 16}'
    assert parse_run("--model_config", text, yaml=yaml, tmp_path=tmp_path)[0].model_config["hidden_size"] == 16
    rope = "{rope_type: yarn, factor: 8.0, rope_theta: 10000.0}"
    assert parse_run("--model", "a", "--rope_parameters", rope)[0].rope_parameters["factor"] == 8.0


def test_lists_come_from_yaml_or_as_words(tmp_path):
    yaml = "models: [a=x, b=y]\nlengths: [4, 8]\n"
    (args,) = parse((PerplexityArguments,), "", _write(tmp_path, yaml) + ["--lengths", "16", "32"])
    assert (args.models, args.lengths) == (["a=x", "b=y"], [16, 32])


def _write(tmp_path, yaml):
    (tmp_path / "list.yaml").write_text(yaml)
    return [str(tmp_path / "list.yaml")]


@pytest.mark.parametrize(
    ("argv", "yaml", "message"),
    [
        (
            ["--model", "a", "--max_lenght", "9"],
            None,
            r"unknown in the command line: 'max_lenght' \(did you mean max_length",
        ),
        (["--model", "a", "--learning", "9"], None, "unknown in the command line: 'learning'"),
        ([], "model: a\nrope_tehta: 1\n", r"run.yaml: 'rope_tehta' \(did you mean rope_theta.*--help lists every key"),
        ([], "- model\n", "holds a list. A run is a YAML mapping"),
        (
            [],
            "model: a\nmax_length: [1\n",
            r"run.yaml cannot be read as YAML: while.*sequence\n.*line 2, col",
        ),
        (
            ["--model_config", "{model_type"],
            None,
            r"model_config cannot be read as YAML: .*\n.*line 1, col",
        ),
        (["absent.yaml"], None, "first argument 'absent.yaml' is not a file"),
        ([], "", "model=None and model_config=None: give exactly one"),
        (["--model", "a", "--model_config", "{model_type: llama}"], None, "model='a' and model_config={'model_type'"),
        (["--model_config", "llama"], None, "model_config='llama' is not a mapping. Write it as '{key: value}'"),
        (["--model", "a", "--rope_theta", "5", "--rope_parameters", "{rope_type: yarn}"], None, "are both given"),
    ],
)
def test_mistakes_are_refused_and_explained(tmp_path, argv, yaml, message):
    with pytest.raises(ValueError, match=message):
        parse_run(*argv, yaml=yaml, tmp_path=tmp_path)


def test_help_lists_every_key_with_its_default(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse_run("--help", yaml="model: a\nmax_length: 77\n", tmp_path=tmp_path)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in ("--attn_implementation", "--context_parallel_size", "--rope_theta", "--learning_rate", "[run.yaml]"):
        assert key in text
    assert "(default: 77)" in " ".join(text.split())


def test_every_algorithm_can_be_chosen_in_the_file_and_on_the_command_line(tmp_path):
    yaml = "model: a\ncontext_parallel_size: 8\nulysses_size: 2\ninner_ring_size: 2\n"
    for argv, ulysses in (([], 2), (["--ulysses_size", "1"], 1), (["--ulysses_size", "auto"], "auto")):
        config = parse_run(*argv, yaml=yaml, tmp_path=tmp_path)[2].config()
        assert (config.context_parallel_size, config.ulysses_size, config.inner_ring_size) == (8, ulysses, 2)
        assert config.transport == "auto"
    argv = ["--inner_ring_size", "1", "--head_chunks", "4"]
    assert parse_run(*argv, yaml=yaml, tmp_path=tmp_path)[2].config().head_chunks == 4
    argv = ["--inner_ring_size", "1", "--transport", "direct"]
    assert parse_run(*argv, yaml=yaml, tmp_path=tmp_path)[2].config().transport == "direct"
    with pytest.raises(ValueError, match="ulysses_size='two' must be a whole number"):
        parse_run("--ulysses_size", "two", yaml=yaml, tmp_path=tmp_path)[2].config()


def positions(max_length=64, rope_theta=None, rope_parameters=None, **config):
    config = AutoConfig.for_model(**{"model_type": "llama", "max_position_embeddings": 16, **config})
    args = ModelArguments(model="a", rope_theta=rope_theta, rope_parameters=rope_parameters)
    set_positions(config, args, max_length)
    return config


def test_theta_is_set_and_the_rest_of_rope_stays():
    config = positions(rope_theta=5e5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert config.max_position_embeddings == 64
    assert positions(max_length=8).max_position_embeddings == 16
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = AutoConfig.for_model("llama", rope_parameters=scaled)
    set_positions(config, ModelArguments(model="a", rope_theta=5e5), 64)
    assert config.rope_parameters == {**scaled, "rope_theta": 5e5}


def test_yarn_scales_from_the_length_of_before():
    config = positions(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})
    assert config.rope_parameters["original_max_position_embeddings"] == 16
    assert config.max_position_embeddings == 64


def test_rope_of_a_model_without_rope_is_refused():
    with pytest.raises(ValueError, match=r"'rope_theta': 50000.0.*a gpt2 configuration has no RoPE to set"):
        positions(rope_theta=5e4, model_type="gpt2")


def test_one_theta_for_a_model_with_several_ropes_is_refused():
    with pytest.raises(ValueError, match=r"gemma3_text has one RoPE per layer type .*rope_theta is none of them"):
        positions(rope_theta=5e4, model_type="gemma3_text")


def test_a_new_model_needs_a_tokenizer():
    with pytest.raises(ValueError, match="a new model needs a tokenizer"):
        load_tokenizer(ModelArguments(model_config={"model_type": "llama"}))
