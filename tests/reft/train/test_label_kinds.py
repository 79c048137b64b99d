"""Labels that are lists: next tokens, a class of each token, or several labels of the text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
)

from reft.config import ReftConfig
from reft.model.reft_model import get_reft_model
from reft.train.collate import ReftDataCollator

PAD = 0


def token_classes(**extra):
    """Two sequences with a class of each token, none of its first."""
    return [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 0, 2, 1], **extra},
        {"input_ids": [9, 8], "labels": [-100, 1], **extra},
    ]


def several(**extra):
    """Two texts of two and three tokens, with three labels each."""
    return [
        {"text": "a", "label": [1.0, 0.0, 1.0], **extra},
        {"text": "a b", "label": [0.0, 0.0, 1.0], **extra},
    ]


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize("multiple", [None, 4, 8])
def test_classes_of_tokens_are_padded_with_ignored_labels(word_tokenizer, multiple):
    batch = ReftDataCollator(word_tokenizer, pad_to_multiple_of=multiple)(token_classes())
    more = 8 - 4 if multiple == 8 else 0
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8] + [PAD] * more, [9, 8] + [PAD] * (2 + more)]
    assert batch["labels"].tolist() == [
        [-100, 0, 2, 1] + [-100] * more,
        [-100, 1] + [-100] * (2 + more),
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]


@pytest.mark.parametrize(
    "make", [np.array, torch.tensor, tuple, lambda x: [np.int64(i) for i in x]]
)
def test_labels_may_be_arrays(word_tokenizer, make):
    features = [{**feature, "labels": make(feature["labels"])} for feature in token_classes()]
    batch = ReftDataCollator(word_tokenizer, prompt_lengths=True)(features)
    assert batch["labels"].tolist() == [[-100, 0, 2, 1], [-100, 1, -100, -100]]
    assert batch["prompt_lengths"].tolist() == [4, 2]


def test_several_labels_of_each_token(word_tokenizer):
    features = [
        {"input_ids": [5, 6], "labels": [[1.0, 0.0], [0.0, 1.0]], "boxes": [[1, 2, 3], [4, 5, 6]]},
        {"input_ids": [7], "labels": [[1.0, 1.0]], "boxes": [[7, 8, 9]]},
    ]
    batch = ReftDataCollator(word_tokenizer, pad_to_multiple_of=3)(features)
    assert batch["labels"].tolist() == [
        [[1.0, 0.0], [0.0, 1.0], [-100.0, -100.0]],
        [[1.0, 1.0], [-100.0, -100.0], [-100.0, -100.0]],
    ]
    assert batch["boxes"].tolist()[1] == [[7, 8, 9], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("texts", [["a", "a b"], ["a b", "a b"], ["a b"]])
def test_several_labels_of_a_text_are_not_padded(word_tokenizer, multiple, texts):
    """Even if there are as many labels as tokens: "a b" has three tokens with <bos>."""
    features = [{"text": text, "label": [1.0, 0.0, 1.0]} for text in texts]
    collator = ReftDataCollator(word_tokenizer, pad_to_multiple_of=multiple, prompt_lengths=True)
    batch = collator(features)
    assert batch["labels"].tolist() == [[1.0, 0.0, 1.0]] * len(texts)
    assert batch["prompt_lengths"].tolist() == [1 + len(text.split()) for text in texts]


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
def test_labels_of_a_text_by_any_name(word_tokenizer, name):
    batch = ReftDataCollator(word_tokenizer)(
        [{"text": "a b", name: [-100, 1, 0]}, {"text": "a", name: [-100, 2]}]
    )
    assert batch["labels"].tolist() == [[-100, 1, 0], [-100, 2, -100]]


def test_a_label_beside_a_completion_is_dropped(word_tokenizer):
    collator = ReftDataCollator(word_tokenizer)
    record = {"prompt": "a", "completion": "b"}
    left = collator([{**record, "label": 1}])
    assert left["labels"].tolist() == collator([record])["labels"].tolist()


# ------------------------------------------------------------------ the prompt


def test_next_tokens_end_the_prompt_and_classes_do_not(word_tokenizer):
    features = token_classes(edit_positions=[0, -1])
    batch = ReftDataCollator(word_tokenizer, prompt_lengths=True)(features)
    assert batch["prompt_lengths"].tolist() == [4, 2]
    assert batch["edit_positions"].tolist() == [[0, 3], [0, 1]]
    following = [
        {**feature, "labels": [-100, *feature["input_ids"][1:]], "edit_positions": [-1]}
        for feature in features
    ]
    batch = ReftDataCollator(word_tokenizer, prompt_lengths=True)(following)
    assert batch["prompt_lengths"].tolist() == [1, 1]
    assert batch["edit_positions"].tolist() == [[0], [0]]


def test_classes_that_equal_ids_by_chance_are_classes(word_tokenizer):
    features = [
        {"input_ids": [5, 6, 7], "labels": [-100, 0, 2]},
        {"input_ids": [9, 2], "labels": [-100, 2]},  # token 2 is of class 2
    ]
    batch = ReftDataCollator(word_tokenizer, prompt_lengths=True)(features)
    assert batch["prompt_lengths"].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("kind", "lengths", "labels"),
    [
        ("token", [2], [[-100, 2, -100, -100]]),
        ("next", [1], [[-100, 2, -100, -100]]),
        ("sequence", [2], [[-100, 2]]),
        (None, [1], [[-100, 2, -100, -100]]),
    ],
)
def test_label_kind_overrides_the_inferred_kind(word_tokenizer, kind, lengths, labels):
    collator = ReftDataCollator(
        word_tokenizer, label_kind=kind, prompt_lengths=True, pad_to_multiple_of=4
    )
    batch = collator([{"input_ids": [9, 2], "labels": [-100, 2]}])
    assert batch["prompt_lengths"].tolist() == lengths
    assert batch["labels"].tolist() == labels
    # label_kind concerns lists only: neither the prompt of a record nor a single label of a text.
    known = collator([{"prompt": "a b", "completion": "c"}]) if kind != "sequence" else None
    assert known is None or known["prompt_lengths"].tolist() == [3]
    assert collator([{"text": "a b", "label": 1}])["labels"].tolist() == [1]


def test_one_float_per_token(word_tokenizer):
    features = [
        {"input_ids": [5, 6, 7], "labels": [0.5, 0.1, 0.2]},
        {"input_ids": [9, 8], "labels": [0.5, 0.25]},
    ]
    inferred = ReftDataCollator(word_tokenizer)(features)
    assert inferred["labels"][1].tolist() == [0.5, 0.25, -100.0]
    explicit = ReftDataCollator(word_tokenizer, label_kind="token", pad_to_multiple_of=4)(
        features[:1]
    )
    assert explicit["labels"].tolist()[0][3] == -100.0


@pytest.mark.parametrize(
    ("settings", "features", "says"),
    [
        ({"label_kind": "tokens"}, None, "label_kind must be None or one of next, token, sequence"),
        (
            {"label_kind": "token"},
            [{"input_ids": [5, 6], "labels": [1]}],
            "one label per token, got 1 labels for 2 tokens",
        ),
        (
            {"max_length": 3, "truncate": True},
            [{"text": "a b c", "label": [-100, 1, 0, 1]}],
            "4 tokens with one label per token and max_length is 3: labels are not truncated",
        ),
        ({}, [{"input_ids": [5, 6], "attention_mask": [1]}], "one entry per token, got 1 for 2"),
        (
            {},
            [{"messages": [{"role": "user", "content": "a"}]}],
            r"'messages'.*apply_chat_template",
        ),
        ({}, [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "'prompt'.*list"),
    ],
)
def test_invalid_features_are_refused(word_tokenizer, settings, features, says):
    with pytest.raises(ValueError, match=says):
        ReftDataCollator(word_tokenizer, **settings)(features)


# ------------------------------------------------------------------ masked tokens


def gaps(**extra):
    """Prompts of attended tokens 5 6 7 and 9, then answers 8 and 6 5."""
    return [
        {
            "input_ids": [5, 3, 6, 7, 8],
            "attention_mask": [1, 0, 1, 1, 1],
            "labels": [-100, -100, -100, -100, 8],
            **extra,
        },
        {
            "input_ids": [3, 3, 9, 6, 5],
            "attention_mask": [0, 0, 1, 1, 1],
            "labels": [-100, -100, -100, 6, 5],
            **extra,
        },
    ]


def test_a_prompt_is_counted_by_its_attended_tokens(word_tokenizer):
    batch = ReftDataCollator(word_tokenizer, prompt_lengths=True)(gaps(edit_positions=[-1, 0]))
    assert batch["prompt_lengths"].tolist() == [3, 1]
    assert batch["edit_positions"].tolist() == [[2, 0], [0, -1]]
    classes = [{**feature, "labels": [0, 1, 1, 0, 1], "edit_positions": [-1]} for feature in gaps()]
    batch = ReftDataCollator(word_tokenizer, prompt_lengths=True)(classes)
    assert batch["prompt_lengths"].tolist() == [4, 3]
    assert batch["edit_positions"].tolist() == [[3], [2]]
    with pytest.raises(ValueError, match="it has 4 tokens, 3 of them prompt, got 4"):
        ReftDataCollator(word_tokenizer)([{**gaps()[0], "edit_positions": [4]}])


def test_a_prompt_length_makes_labels_of_attended_tokens(word_tokenizer):
    features = [
        {
            **{name: feature[name] for name in ("input_ids", "attention_mask")},
            "prompt_length": length,
        }
        for feature, length in zip(gaps(), (3, 1), strict=True)
    ]
    labels = ReftDataCollator(word_tokenizer)(features)["labels"]
    assert labels.tolist() == [feature["labels"] for feature in gaps()]


def test_a_packed_row_holds_the_attended_tokens(word_tokenizer):
    collator = ReftDataCollator(word_tokenizer, padding_free=True, prompt_lengths=True)
    batch = collator(gaps(edit_positions=[-1]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 6, 5]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, -100, 6, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7]
    assert batch["prompt_lengths"].tolist() == [3, 1]
    assert batch["edit_positions"].tolist() == [[2], [0]]
    assert batch["max_length_q"] == 4
    nobody = {"input_ids": [5], "attention_mask": [0], "labels": [-100]}
    with pytest.raises(ValueError, match="got none in feature 1"):
        collator([{"input_ids": [5], "attention_mask": [1], "labels": [-100]}, nobody])


def test_packed_labels_of_tokens_are_flat(word_tokenizer):
    collator = ReftDataCollator(word_tokenizer, padding_free=True)
    assert collator(token_classes())["labels"].tolist() == [[-100, 0, 2, 1, -100, 1]]
    # The longest sequence has as many tokens as labels, which stay one row per sequence.
    assert collator(several())["labels"].tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


# ------------------------------------------------------------------ models


BERT = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "num_labels": 3}


def multi_label():
    return BertForSequenceClassification(
        BertConfig(**BERT, problem_type="multi_label_classification")
    )


def token_encoder():
    return BertForTokenClassification(BertConfig(**BERT))


def token_decoder():
    settings = {**BERT, "num_key_value_heads": 2}
    return LlamaForTokenClassification(LlamaConfig(**settings, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("make", "features"),
    [(multi_label, several), (token_encoder, token_classes), (token_decoder, token_classes)],
    ids=["several", "tokens-of-encoder", "tokens-of-decoder"],
)
@pytest.mark.parametrize("with_lengths", [False, True], ids=["edit-positions", "prompt-lengths"])
@torch.no_grad()
def test_a_batch_has_the_edits_of_each_text_alone(word_tokenizer, make, features, with_lengths):
    torch.manual_seed(0)
    config = ReftConfig(rank=2, positions="given" if not with_lengths else "f1+l1")
    model = get_reft_model(make().eval(), config).eval()
    rows = features(edit_positions=[0, -1]) if not with_lengths else features()
    collator = ReftDataCollator(word_tokenizer, prompt_lengths=with_lengths, pad_to_multiple_of=4)
    batch = collator(rows)
    logits = model(**batch).logits
    assert model(**batch).loss.isfinite()
    with model.disable_adapter():
        unedited = model(**{k: v for k, v in batch.items() if k != "edit_positions"}).logits
    assert not torch.allclose(logits, unedited, atol=1e-4)
    for number, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids = batch["input_ids"][number : number + 1, :length]
        options = {} if with_lengths else {"edit_positions": [[0, length - 1]]}
        alone = model(ids, **options).logits[0]
        got = logits[number] if alone.ndim == 1 else logits[number, :length]
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)
