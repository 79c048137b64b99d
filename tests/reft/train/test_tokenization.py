"""Tokenisation: one start token, one end token, completions decoded up to their end."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from reft.train.collate import ReftDataCollator
from reft.train.tokenization import completion_text, end_ids, expected_text, prompt_ids

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<cls>", "<sep>", "<lang>", "<turn>"]
WORDS = [*SPECIAL, "a", "b", "c", "d"]
NUMBER = {word: number for number, word in enumerate(WORDS)}


def ids(text: str) -> list[int]:
    return [NUMBER.get(word, NUMBER["<unk>"]) for word in text.split()]


def tokenizer_of(single: str | None, unk: str = "<unk>") -> PreTrainedTokenizerFast:
    """A tokenizer of words that adds special tokens by the template ``single``."""
    words = Tokenizer(models.WordLevel(NUMBER, unk_token=unk))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        added = [token for token in single.split() if token != "$A"]
        words.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, NUMBER[token]) for token in added]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token=unk,
        cls_token="<cls>",
        sep_token="<sep>",
        extra_special_tokens=["<lang>"],
        model_max_length=32,
    )


#: Template of special tokens, a prompt, its tokens as words.
PROMPTS = [
    ("<bos> $A", "a b", "<bos> a b"),
    ("<bos> $A", "<bos> a b", "<bos> a b"),
    ("<bos> $A", " <bos> a b", "<bos> a b"),
    ("<bos> $A", "<bos>", "<bos>"),
    ("<bos> $A", "a <bos> b", "<bos> a <bos> b"),
    ("<bos> $A", "<bos> <bos> a", "<bos> <bos> a"),
    ("<bos> $A", "a a", "<bos> a a"),
    (None, "<bos> a", "<bos> a"),
    (None, "a b", "a b"),
    ("<bos> <lang> $A", "<bos> <lang> a", "<bos> <lang> a"),
    ("<bos> <lang> $A", "<bos> a", "<bos> a"),
    ("<lang> $A <eos>", "<lang> a", "<lang> a"),
    ("<lang> $A <eos>", "a", "<lang> a"),
    ("<bos> $A <eos>", "<bos> a <eos>", "<bos> a <eos>"),
    ("<cls> $A <sep>", "<cls> a <sep>", "<cls> a <sep>"),
    ("<cls> $A <sep>", "<cls> a <sep> b", "<cls> a <sep> b <sep>"),
]


@pytest.mark.parametrize(("single", "prompt", "expected"), PROMPTS)
def test_a_prompt_has_one_start(single, prompt, expected):
    tokenizer = tokenizer_of(single)
    assert prompt_ids(tokenizer, prompt) == ids(expected)
    feature = ReftDataCollator(tokenizer).tokenize({"prompt": prompt, "completion": "c"})
    assert feature["input_ids"] == [*ids(expected), *ids("c <eos>")]
    assert feature["labels"] == [-100] * len(ids(expected)) + ids("c <eos>")


def test_a_start_token_that_is_also_the_unknown_token():
    tokenizer = tokenizer_of("<bos> $A", unk="<bos>")
    assert prompt_ids(tokenizer, "zebra a") == ids("<bos> <bos> a")
    assert prompt_ids(tokenizer, "<bos> a") == ids("<bos> a")


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        ("<bos> $A", "<bos> a b", "<bos> a b"),
        ("<cls> $A <sep>", "a b", "<cls> a b <sep>"),
        ("<cls> $A <sep>", "<cls> a b <sep>", "<cls> a b <sep>"),
        ("<cls> $A <sep>", "<cls> a b", "<cls> a b <sep>"),
        ("<cls> $A <sep>", "a b <sep>", "<cls> a b <sep>"),
        (None, "<cls> a b", "<cls> a b"),
    ],
)
def test_a_text_has_one_start_and_one_end_in_every_field(single, text, expected):
    tokenizer = tokenizer_of(single)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    feature = ReftDataCollator(tokenizer).tokenize({"text": text, "label": 1})
    assert feature["input_ids"] == ids(expected)
    assert feature["attention_mask"] == [1] * len(ids(expected))
    assert len(feature["token_type_ids"]) == len(ids(expected))


@pytest.mark.parametrize("text", ["<cls> a b c d", "a b c d"])
def test_a_truncated_text_keeps_one_start_and_the_end(text):
    collator = ReftDataCollator(tokenizer_of("<cls> $A <sep>"), max_length=4, truncate=True)
    feature = collator.tokenize({"text": text, "label": 1})
    assert feature["input_ids"] == ids("<cls> a b <sep>")


def test_a_rendered_chat_has_the_tokens_of_the_chat():
    tokenizer = tokenizer_of("<bos> $A")
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chat = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}]
    for start in ("{{ bos_token }} ", "<bos> "):
        tokenizer.chat_template = start + template
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        served = tokenizer.apply_chat_template(chat, return_dict=False)
        assert served == ids("<bos> a b c")
        batch = ReftDataCollator(tokenizer)([{"prompt": rendered, "completion": "d"}])
        assert batch["input_ids"].tolist() == [served + ids("d <eos>")]
        assert batch["labels"].tolist() == [[-100] * len(served) + ids("d <eos>")]


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (None, "<eos>"),
        (GenerationConfig(), "<eos>"),
        (GenerationConfig(eos_token_id=2), "<eos>"),
        (GenerationConfig(eos_token_id=NUMBER["<turn>"]), "<turn> <eos>"),
        (GenerationConfig(eos_token_id=[NUMBER["<sep>"], NUMBER["<turn>"]]), "<sep> <turn> <eos>"),
    ],
)
def test_ends_are_those_of_model_and_tokenizer(configured, expected):
    assert end_ids(configured, tokenizer_of(None)) == ids(expected)


def test_a_tokenizer_without_an_end_token():
    tokenizer = tokenizer_of(None)
    tokenizer.eos_token = None
    assert end_ids(GenerationConfig(eos_token_id=5), tokenizer) == [5]
    assert end_ids(None, tokenizer) == []


def test_completions_are_decoded_up_to_their_end():
    tokenizer = tokenizer_of(None)
    ends = ids("<eos> <turn>")  # for the tokenizer <turn> is no special token
    assert completion_text(tokenizer, ids("a <lang> b <turn> c"), ends) == "a b"
    assert completion_text(tokenizer, ids("a <turn>"), ids("<eos>")) == "a <turn>"
    for completion in ("a b", "a b <eos>", "a b <turn>", "<lang> a b <turn> <eos>"):
        assert expected_text(tokenizer, completion, ends) == "a b"
    assert expected_text(tokenizer, "a  zebra", ends) == "a  zebra"
