"""ReftDataCollator: token ids, labels and padding, against values written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from reft.train.collate import ReftDataCollator

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture
def ids(word_tokenizer):
    """Token ids of words."""
    return lambda words: word_tokenizer.convert_tokens_to_ids(words.split())


def lists(batch):
    return {name: value.tolist() for name, value in batch.items()}


def test_prompts_and_completions(word_tokenizer, ids):
    batch = ReftDataCollator(word_tokenizer)(
        [{"prompt": "a b c", "completion": "yes"}, {"prompt": "d", "completion": "no no"}]
    )
    assert lists(batch) == {
        "input_ids": [
            [BOS, *ids("a b c yes"), EOS],
            [BOS, *ids("d no no"), EOS, PAD],
        ],
        "attention_mask": [[1] * 6, [1] * 5 + [0]],
        "labels": [
            [-100] * 4 + [*ids("yes"), EOS],
            [-100] * 2 + [*ids("no no"), EOS, -100],
        ],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_prompt_tokens_are_the_same_in_inference(word_tokenizer, ids):
    collator = ReftDataCollator(word_tokenizer)
    alone = collator([{"prompt": "a b"}, {"prompt": "a"}])
    assert lists(alone) == {
        "input_ids": [[BOS, *ids("a b")], [BOS, *ids("a"), PAD]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert collator.prompt_ids("a b") == [BOS, *ids("a b")]


def test_an_end_token_that_the_tokenizer_adds_to_a_prompt_is_removed(word_tokenizer, ids):
    class Ending:
        """A tokenizer that ends every text with its end token, as some do."""

        def __init__(self):
            self.eos_token_id, self.eos_token, self.pad_token_id = EOS, "<eos>", PAD
            self.model_max_length = 32

        def __call__(self, text, add_special_tokens=True):
            ids = word_tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": ids + [EOS] * add_special_tokens}

    collator = ReftDataCollator(Ending())
    feature = collator.tokenize({"prompt": "a", "completion": "b"})
    assert feature["input_ids"] == [BOS, *ids("a b"), EOS]
    assert feature["labels"] == [-100, -100, *ids("b"), EOS]
    # An end token in the prompt's text stays.
    assert collator.prompt_ids("a <eos>")[:3] == [BOS, *ids("a"), EOS]


@pytest.mark.parametrize(
    ("append_eos", "completion", "tail"),
    [(True, "yes", "yes <eos>"), (True, "yes <eos>", "yes <eos>"), (False, "yes", "yes")],
)
def test_completions_end_once_or_not_at_all(word_tokenizer, ids, append_eos, completion, tail):
    collator = ReftDataCollator(word_tokenizer, append_eos=append_eos)
    feature = collator.tokenize({"prompt": "a", "completion": completion})
    assert feature["input_ids"] == [BOS, *ids("a"), *ids(tail)]


def test_tokenised_features(word_tokenizer):
    batch = ReftDataCollator(word_tokenizer)(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "token_type_ids": [0, 1, 1]},
            {
                "input_ids": torch.tensor([8]),
                "labels": np.array([8]),
                "token_type_ids": [1],
                "text": "a leftover column",
            },
        ]
    )
    assert lists(batch) == {
        "input_ids": [[5, 6, 7], [8, PAD, PAD]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "token_type_ids": [[0, 1, 1], [1, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_a_given_attention_mask_is_kept(word_tokenizer):
    batch = ReftDataCollator(word_tokenizer)(
        [{"input_ids": [5, 6], "attention_mask": [0, 1]}, {"input_ids": [7], "attention_mask": [1]}]
    )
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("name", ["prompt_length", "prompt_lengths"])
def test_a_prompt_length_makes_the_labels(word_tokenizer, name):
    features = [{"input_ids": [5, 6, 7], name: 2}, {"input_ids": [8, 9], name: torch.tensor(1)}]
    batch = ReftDataCollator(word_tokenizer)(features)
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    # The plural is an argument of the model and stays in the batch; the singular is dropped.
    assert ("prompt_lengths" in batch) == (name == "prompt_lengths")
    requested = ReftDataCollator(word_tokenizer, prompt_lengths=True)(features)
    assert requested["prompt_lengths"].tolist() == [2, 1]


def test_prompt_lengths_on_request(word_tokenizer):
    collator = ReftDataCollator(word_tokenizer, prompt_lengths=True)
    raw = collator([{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e"}])
    assert raw["prompt_lengths"].tolist() == [3, 2]
    labelled = collator([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert labelled["prompt_lengths"].tolist() == [1]
    unlabelled = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}])
    assert unlabelled["prompt_lengths"].tolist() == [3, 1]
    classified = collator([{"text": "a b", "label": 1}])
    assert classified["prompt_lengths"].tolist() == [3]


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [([1, 0], torch.int64), ([0.5, 2.0], torch.float32)],
    ids=["class", "value"],
)
@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
def test_labels_of_sequences_stay_what_they_are(word_tokenizer, name, labels, dtype):
    batch = ReftDataCollator(word_tokenizer)(
        [{"input_ids": [5, 6], name: labels[0]}, {"input_ids": [7], name: labels[1]}]
    )
    assert batch["labels"].tolist() == labels
    assert batch["labels"].dtype == dtype
    assert "label" not in batch


def test_text_and_label(word_tokenizer, ids):
    batch = ReftDataCollator(word_tokenizer)(
        [{"text": "a b", "label": 1}, {"text": "c", "label": 0}]
    )
    assert batch["input_ids"].tolist() == [[BOS, *ids("a b")], [BOS, *ids("c"), PAD]]
    assert batch["labels"].tolist() == [1, 0]


def test_many_labels_a_sequence_are_not_padded(word_tokenizer):
    batch = ReftDataCollator(word_tokenizer)(
        [{"input_ids": [5, 6, 7], "labels": [0.0, 1.0]}, {"input_ids": [8], "labels": [1.0, 1.0]}]
    )
    assert batch["labels"].tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_adapter_names_reach_the_model_as_a_list(word_tokenizer):
    features = [
        {"prompt": "a", "completion": "b", "adapter_names": "one"},
        {"prompt": "a b", "completion": "b", "adapter_names": "__base__"},
    ]
    assert ReftDataCollator(word_tokenizer)(features)["adapter_names"] == ["one", "__base__"]


def test_padding_to_a_multiple_is_on_the_right_for_every_tokenizer(word_tokenizer):
    assert word_tokenizer.padding_side == "left"
    batch = ReftDataCollator(word_tokenizer, pad_to_multiple_of=8)(
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7] + [PAD] * 5]
    assert batch["labels"].tolist() == [[5, 6, 7] + [-100] * 5]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5]


def test_the_features_are_not_changed(word_tokenizer):
    features = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    ReftDataCollator(word_tokenizer)(features)
    assert features == [
        {"input_ids": [5, 6], "labels": [5, 6]},
        {"input_ids": [7], "labels": [7]},
    ]


# ------------------------------------------------------------------ lengths


def test_a_prompt_without_room_is_refused_and_not_truncated(word_tokenizer):
    collator = ReftDataCollator(word_tokenizer, max_length=3, truncate=True)
    with pytest.raises(ValueError, match=r"prompt has 4 tokens and max_length is 3.*'a b c'"):
        collator.tokenize({"prompt": "a b c", "completion": "d"})
    with pytest.raises(ValueError, match=r"prompt has 3 tokens.*no room for the completion"):
        collator.tokenize({"prompt": "a b", "completion": "d"})
    assert len(collator.tokenize({"prompt": "a b"})["input_ids"]) == 3
    with pytest.raises(ValueError, match="is 3: too long"):
        collator.tokenize({"prompt": "a b c"})


def test_a_completion_is_truncated_only_on_request(word_tokenizer, ids):
    record = {"prompt": "a", "completion": "b c d"}
    with pytest.raises(ValueError, match=r"2 \+ 4 tokens and max_length is 4.*truncate=True"):
        ReftDataCollator(word_tokenizer, max_length=4)(  # the batch refuses like the record
            [record]
        )
    feature = ReftDataCollator(word_tokenizer, max_length=4, truncate=True).tokenize(record)
    assert feature["input_ids"] == [BOS, *ids("a b c")]
    assert feature["labels"] == [-100, -100, *ids("b c")]
    assert ReftDataCollator(word_tokenizer, max_length=6).tokenize(record)["input_ids"][-1] == EOS


def test_a_text_is_truncated_only_on_request(word_tokenizer, ids):
    record = {"text": "a b c d", "label": 1}
    with pytest.raises(ValueError, match=r"text has 5 tokens and max_length is 3"):
        ReftDataCollator(word_tokenizer, max_length=3).tokenize(record)
    feature = ReftDataCollator(word_tokenizer, max_length=3, truncate=True).tokenize(record)
    assert feature["input_ids"] == [BOS, *ids("a b")]


def test_the_limit_is_the_tokenizers_unless_given(word_tokenizer):
    assert ReftDataCollator(word_tokenizer).limit == 32
    assert ReftDataCollator(word_tokenizer, max_length=7).limit == 7
    with pytest.raises(ValueError, match="max_length is 32"):
        ReftDataCollator(word_tokenizer).tokenize({"prompt": "a " * 32, "completion": "b"})
    with pytest.raises(ValueError, match="max_length must be at least 1 or None, got 0"):
        ReftDataCollator(word_tokenizer, max_length=0)


# ------------------------------------------------------------------ refused features


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ([], "at least one feature"),
        ([{"question": "a"}], r"'input_ids', or 'prompt'.*\['question'\]"),
        ([{"input_ids": [5]}, {"input_ids": [5], "labels": [5]}], "same fields"),
        ([{"input_ids": [5], "name": "x"}], "'name'.*does not make a tensor"),
        ([{"input_ids": [5, 6], "labels": [5]}, {"input_ids": [5], "labels": []}], "'labels'"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused(word_tokenizer, features, says):
    with pytest.raises(ValueError, match=says):
        ReftDataCollator(word_tokenizer)(features)


class TestEditPositions:
    def features(self):
        return [
            {"prompt": "a b c", "completion": "yes", "edit_positions": [-1, 0, 3]},
            {"prompt": "d", "completion": "no no", "edit_positions": (1, 4)},
            {"prompt": "e", "completion": "no", "edit_positions": []},
        ]

    def test_positions_count_from_the_first_token(self, word_tokenizer):
        batch = ReftDataCollator(word_tokenizer)(self.features())
        assert batch["edit_positions"].tolist() == [[3, 0], [1, 4], [-1, -1]]
        assert "prompt_lengths" not in batch

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ([-5], "6 tokens, 4 of them prompt, got -5"),
            ([6], "6 tokens, 4 of them prompt, got 6"),
            (["a"], r"a list of token numbers, got \['a'\]"),
            (3, "a list of token numbers, got 3"),
        ],
    )
    def test_invalid_positions_are_refused(self, word_tokenizer, value, says):
        feature = {"prompt": "a b c", "completion": "yes", "edit_positions": value}
        with pytest.raises(ValueError, match=says):
            ReftDataCollator(word_tokenizer)([feature])


class TestPaddingFree:
    def features(self):
        records = [("a b c", "yes"), ("d", "no no"), ("e f", "yes")]
        return [{"prompt": prompt, "completion": answer} for prompt, answer in records]

    def test_it_equals_the_collator_of_transformers(self, word_tokenizer):
        collator = ReftDataCollator(word_tokenizer, padding_free=True)
        rows = [
            {name: row[name] for name in ("input_ids", "labels")}
            for row in map(collator.tokenize, self.features())
        ]
        theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
        ours = collator(self.features())
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            got = ours[name]
            assert got.tolist() == value.tolist() if hasattr(value, "tolist") else got == value

    def test_fields_of_sequences_stay_one_per_sequence(self, word_tokenizer):
        collator = ReftDataCollator(word_tokenizer, padding_free=True, prompt_lengths=True)
        extra = {"adapter_names": "default", "edit_positions": [0]}
        batch = collator([{**row, **extra} for row in self.features()])
        assert batch["prompt_lengths"].tolist() == [4, 2, 3]
        assert batch["adapter_names"] == ["default"] * 3
        assert batch["edit_positions"].tolist() == [[0]] * 3
        assert batch["input_ids"].shape == batch["labels"].shape == (1, 16)

    def test_padding_to_a_multiple_is_refused(self, word_tokenizer):
        with pytest.raises(ValueError, match="pad_to_multiple_of must be None"):
            ReftDataCollator(word_tokenizer, padding_free=True, pad_to_multiple_of=8)
