"""Texts with vision codes: tokens behind the words, weights by modality, and an error for every row that is none."""

import json

import pytest
import torch
from datasets import Dataset

from ring_hf.data import FORMATS, FormatSettings, load_rows, tokenize_source
from ring_hf.data.vision_codes import (
    CODES_PER_FRAME,
    END_OF_FRAME,
    END_OF_VISION,
    VISION_VOCABULARY,
    add_vision_vocabulary,
    split_modalities,
)
from tests.data.test_conversations import tokenizer
from tests.hf.models import llama

FRAME = list(range(CODES_PER_FRAME))
IMAGE = ["<vision>", *FRAME, END_OF_VISION, "</vision>"]
VIDEO = ["A video: <vision>", *FRAME, END_OF_FRAME, *FRAME, END_OF_VISION, "</vision> of a dog."]
WORDS = 258  # of the tokenizer


def tokens_of(tmp_path, *contents, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"content": content}) for content in contents))
    rows = load_rows(str(path), FORMATS["vision_codes"].row_columns({}))
    return tokenize_source(rows, tokenizer(), "vision_codes", FormatSettings("rows", options=options))


def test_codes_are_tokens_behind_the_words(tmp_path):
    question = {"text": "What is it? ", "loss": False}
    tokens = tokens_of(tmp_path, VIDEO, [*IMAGE, question, "A dog."], text_weight=2.0, vision_weight=0.5)
    video, image = tokens[0], tokens[1]
    codes = [*FRAME, END_OF_FRAME, *FRAME, END_OF_VISION]
    texts = b"A video: <vision>", b"</vision> of a dog."
    assert video["input_ids"] == [*texts[0], *(WORDS + code for code in codes), *texts[1], 256]
    assert video["labels"] == video["input_ids"]
    assert video["loss_weights"] == [2.0] * len(texts[0]) + [0.5] * len(codes) + [2.0] * (len(texts[1]) + 1)
    end = len(b"What is it? A dog.") + 1
    assert image["labels"][-end:] == [-100] * len(b"What is it? ") + [*b"A dog.", 256]
    assert max(image["input_ids"]) == WORDS + END_OF_VISION


def test_a_weight_of_zero_is_no_loss(tmp_path):
    (row,) = tokens_of(tmp_path, IMAGE, vision_weight=0)
    assert {token for token in row["labels"] if token >= WORDS} == set() and -100 in row["labels"]
    with pytest.raises(ValueError, match=r"text_weight=-1.0, vision_weight=1.0: give numbers from 0 on"):
        tokens_of(tmp_path, IMAGE, text_weight=-1)
    with pytest.raises(ValueError, match="offset=100 would give vision codes the tokens of words; there are 258"):
        tokens_of(tmp_path, IMAGE, offset=100)


BAD = {
    "code out of range": ["<vision>", *FRAME[:-1], 9000, END_OF_VISION, "</vision>"],
    "a negative code": ["<vision>", *FRAME[:-1], -1, END_OF_VISION, "</vision>"],
    "a short frame": ["<vision>", *FRAME[:-1], END_OF_VISION, "</vision>"],
    "a long frame": ["<vision>", *FRAME, 5, END_OF_VISION, "</vision>"],
    "a frame without an end": ["<vision>", *FRAME, "</vision>"],
    "no last frame": ["<vision>", *FRAME, END_OF_FRAME, "</vision>"],
    "no codes": ["<vision>", "</vision>"],
    "codes outside": ["text", *FRAME, END_OF_VISION],
    "codes behind the end": ["<vision>", *FRAME, END_OF_VISION, 3, "</vision>"],
    "no start": [*IMAGE, "</vision>"],
    "no stop": ["<vision>", *FRAME, END_OF_VISION],
    "another text": ["<vision>", *FRAME, END_OF_VISION, "and"],
    "start inside a text": ["see <vision> here"],
    "a fraction": ["<vision>", 0.5],
    "a list": [[1, 2]],
    "no text": [{"text": 3}],
    "no list": "text",
}
MESSAGES = {
    "code out of range": "item 257 of 'content' is the code 9000; codes go from 0 to 8,191",
    "a negative code": "is the code -1; codes go from 0",
    "a short frame": "item 257 of 'content' ends a frame of image 1 after 255 codes, not 256",
    "a long frame": "item 258 of 'content' is code 257 of a frame of image 1; after 256 comes 8192 or 8193",
    "a frame without an end": "is the text '</vision>' after 256 codes of a frame of image 1",
    "no last frame": "is the text '</vision>' after 0 codes of a frame of image 1",
    "no codes": "is the text '</vision>' after 0 codes of a frame of image 1",
    "codes outside": "item 2 of 'content' is the code 0 outside <vision> and </vision>",
    "codes behind the end": "item 259 of 'content' is a code behind 8193; </vision> is missing",
    "no start": "is '</vision>'. <vision> ends the text before codes",
    "no stop": "the row ends inside <vision>",
    "another text": "is 'and', but </vision> is missing",
    "start inside a text": "is 'see <vision> here'. <vision> ends the text before codes",
    "a fraction": "is '0.5', neither a text nor a code",
    "a list": r"is '\[1, 2\]', neither a text nor a code",
    "no text": 'Write {"text": "...", "loss": false}',
    "no list": "'content' holds 'text' and no list of texts and vision codes",
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_of_other_codes_is_an_error_with_its_line(tmp_path, name):
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{MESSAGES[name]}"):
        tokens_of(tmp_path, VIDEO, BAD[name])


def test_the_embeddings_get_rows_for_codes_once():
    model = llama(vocab_size=WORDS)
    before = model.get_input_embeddings().weight[:WORDS].clone()
    state = torch.get_rng_state()
    assert add_vision_vocabulary(model, tokenizer()) == WORDS
    assert torch.get_rng_state().equal(state)  # ranks may not have the same weights yet
    assert model.get_input_embeddings().weight.shape[0] == WORDS + VISION_VOCABULARY == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == WORDS + VISION_VOCABULARY
    assert model.get_input_embeddings().weight[:WORDS].equal(before)
    after = model.get_input_embeddings().weight
    assert add_vision_vocabulary(model, tokenizer()) == WORDS and model.get_input_embeddings().weight is after
    with pytest.raises(ValueError, match="trained with vision codes from token 258 on, but they would begin at 300"):
        add_vision_vocabulary(model, tokenizer(), 300)


def test_evaluation_splits_the_loss_by_modality():
    rows = Dataset.from_dict({"input_ids": [[1, 300, 2], [1, 2, 3]], "labels": [[1, 300, 2], [-100, 2, 3]]})
    split = split_modalities(rows, WORDS)
    assert split["text"]["labels"] == [[1, -100, 2], [-100, 2, 3]] and split["vision"]["labels"] == [[-100, 300, -100]]
    with pytest.raises(ValueError, match="no row has a loss of vision"):
        split_modalities(rows.select([1]), WORDS)
