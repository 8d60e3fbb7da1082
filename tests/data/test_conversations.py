"""Conversations become the tokens and labels that TRL's SFTTrainer computes of the same rows."""

import json
import logging

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ring_hf.data import FORMATS, FormatSettings, build_byte_tokenizer, load_rows, tokenize_source
from ring_hf.data.byte_level import END_OF_TEXT, PADDING
from ring_hf.data.conversations import find_template
from ring_hf.data.example_weights import check_weighting, weigh_examples
from tests.hf.models import llama

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}<call>{{ call | tojson }}</call>"
    "{% endfor %}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}], "tools": None},
    {
        "messages": [
            {"role": "user", "content": "Weather in Ulm?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye"},
        ],
        "tools": [WEATHER],
    },
]
COMPLETIONS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "A", "completion": "B" + END_OF_TEXT}]
MESSAGES = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CONVERSATIONS]


def tokenizer(template=TEMPLATE):
    return PreTrainedTokenizerFast(
        tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING, chat_template=template
    )


def tokens_of(tmp_path, rows, name="messages", template=TEMPLATE, errors="raise", **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_rows(str(path), FORMATS[name].row_columns({}), errors=errors)
    return tokenize_source(loaded, tokenizer(template), name, FormatSettings("rows", errors, options=options))


def trl_tokens(tmp_path, rows, **settings):
    args = SFTConfig(str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=None, **settings)
    dataset = Dataset.from_list([{**row, "tools": json.dumps(row.get("tools"))} for row in rows])
    trainer = SFTTrainer(llama("sdpa"), args, train_dataset=dataset, processing_class=tokenizer())
    return trainer.train_dataset.select_columns(["input_ids", "labels"])[:]


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize(
    ("name", "rows"),
    [("messages", CONVERSATIONS), ("prompt_completion", COMPLETIONS), ("prompt_completion", MESSAGES)],
)
def test_tokens_and_labels_are_those_of_trl(tmp_path, name, rows, only):
    option = "assistant_only_loss" if name == "messages" else "completion_only_loss"
    tokens = tokens_of(tmp_path, rows, name, **{option: only})
    assert tokens[:] == trl_tokens(tmp_path, rows, **{option: only})
    assert all((-100 in labels) is only for labels in tokens["labels"])


def test_assistant_tokens_of_all_turns_have_a_loss_with_their_end(tmp_path):
    row = tokens_of(tmp_path, CONVERSATIONS)[1]
    text = tokenizer().decode([token for token in row["labels"] if token != -100])
    assert text.count(END_OF_TEXT) == 3 and "It is sunny." in text and "<call>" in text and "Thanks" not in text


def test_null_values_of_columnar_files_are_no_part_of_a_message(tmp_path):
    columns = Dataset.from_list(CONVERSATIONS)  # Arrow gives all messages the same keys
    assert columns[0]["messages"][0]["tool_calls"] is None
    tokens = tokenize_source(columns, tokenizer(), "messages", FormatSettings())
    assert tokens[:] == tokens_of(tmp_path, CONVERSATIONS)[:]


BAD = {
    "text": ({"messages": "Hello"}, "'messages' holds 'Hello' and no list of messages", "no conversation"),
    "nothing": ({"messages": []}, "and no list of messages", "no conversation"),
    "role": ({"messages": [{"from": "a", "value": "b"}]}, r"has no role, only \['from', 'value'\]", "no conversation"),
    "content": ({"messages": [{"role": "user"}]}, "has neither content nor tool_calls", "no conversation"),
    "user": (
        {"messages": [{"role": "user", "content": "a"}]},
        "none of its 8 tokens is the assistant's",
        "without a loss",
    ),
    "template": (
        {
            "messages": CONVERSATIONS[0]["messages"],
            "tools": [{"name": {"a": 1}}],
            "chat_template_kwargs": {"messages": 1},
        },
        "the chat template refuses the row: TypeError: ",
        "refused by the template",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_names_its_row_or_is_counted(tmp_path, caplog, name):
    row, message, kind = BAD[name]
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}"):
        tokens_of(tmp_path, [CONVERSATIONS[0], row])
    with caplog.at_level(logging.WARNING, "ring_hf"):
        assert len(tokens_of(tmp_path, [CONVERSATIONS[0], row], errors="skip")) == 1
    assert f"1 of 2 rows of rows are left out: 1 {kind}; the first is" in caplog.text


def test_a_prompt_that_does_not_begin_the_row_is_reported_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ring_hf"):
        template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        tokens = tokens_of(tmp_path, MESSAGES[:1], "prompt_completion", template)
    assert caplog.text.count("'1Hello' is left out of the sequence") == 1
    assert tokens["labels"] == tokens["input_ids"]  # they differ from the first token on
    with pytest.raises(ValueError, match=r"'completion' 'b'\. Write both as text, or both as lists of messages"):
        tokens_of(tmp_path, [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "prompt_completion")


def test_templates_without_marks_and_without_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the chat template has no \{% generation %\} marks.*set chat_template to"):
        tokens_of(tmp_path, CONVERSATIONS, template="{{ messages }}", errors="skip")
    assert len(tokens_of(tmp_path, CONVERSATIONS, template="{{ messages }}", assistant_only_loss=False)) == 2
    with pytest.raises(ValueError, match="The tokenizer has no chat template, so messages cannot be written"):
        tokens_of(tmp_path, CONVERSATIONS, template=None)
    with pytest.raises(ValueError, match=r"chat_template='no/chat.jinja' is no file that exists"):
        tokens_of(tmp_path, CONVERSATIONS, chat_template="no/chat.jinja")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    path = str(tmp_path / "chat.jinja")
    assert (
        tokens_of(tmp_path, CONVERSATIONS, template=None, chat_template=path)[:]
        == tokens_of(tmp_path, CONVERSATIONS)[:]
    )
    several = tokenizer()
    several.chat_template = {"default": "d", "tool_use": "t"}
    assert find_template(several) == "d"


def test_weights_of_every_example_sum_to_one():
    tokens = Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9]], "labels": [[1, 2, -100], None, [6, 7, 8, 9]]}
    )
    assert weigh_examples(tokens)["loss_weights"] == [[0, 1, 0], [0, 1], [0, *[pytest.approx(1 / 3)] * 3]]
    weighted = tokens.add_column("loss_weights", [[1.0, 4.0, 1.0], None, [9.0, 1.0, 1.0, 2.0]])
    assert weigh_examples(weighted)["loss_weights"] == [[0, 1, 0], [0, 1], [0, 0.25, 0.25, 0.5]]
    assert weigh_examples(tokens.remove_columns("labels"))["loss_weights"][0] == [0, 0.5, 0.5]
    with pytest.raises(ValueError, match="example 1 has no target with a weight"):
        weigh_examples(Dataset.from_dict({"input_ids": [[5]]}))
    with pytest.raises(ValueError, match=r"loss_weighting='rows' is unknown\. Choose one of tokens, examples"):
        check_weighting("rows")
