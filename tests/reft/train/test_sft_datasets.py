"""Conversations: each answer is an example with the prompt of generation, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import SFTConfig
from trl_runs import MARKED, SETTINGS, UNMARKED, chat_tokenizer, edited, losses, wrapped

from reft import ReftDataCollator, ReftSFTTrainer, ReftTrainer
from reft.train.answer_checks import check_batch
from reft.train.sft_datasets import answer_spans, split_conversations


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


#: name -> messages and, for each answer, the number of messages before it.
CHATS = {
    "one turn": ([user("a : one"), says("red")], [1]),
    "two turns": ([user("a"), says("red"), user("b : two"), says("green blue")], [1, 3]),
    "a system": ([{"role": "system", "content": "c d"}, user("a"), says("red")], [2]),
    "a tool": (
        [user("a"), says("b"), {"role": "tool", "content": "five"}, says("red"), user("e")],
        [1, 3],
    ),
    "opens": ([says("yes"), user("a"), says("red"), user("b"), says("blue")], [2, 4]),
}


@pytest.fixture
def sft(word_tokenizer, tmp_path):
    def build(model, rows, template=MARKED, **settings):
        more = {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
        args = {**SETTINGS, "assistant_only_loss": True, "shuffle_dataset": False, **settings}
        return ReftSFTTrainer(
            model,
            args=SFTConfig(str(tmp_path / "run"), **args),
            train_dataset=rows if not isinstance(rows, list) else Dataset.from_list(rows),
            processing_class=chat_tokenizer(word_tokenizer, template),
            **more,
        )

    return build


class TestEachAnswer:
    @pytest.mark.parametrize(
        ("name", "template"), [*((name, MARKED) for name in CHATS), ("two turns", UNMARKED)]
    )
    def test_is_an_example_with_the_prompt_of_generation(self, word_llama, sft, name, template):
        messages, begins = CHATS[name]
        trainer = sft(wrapped(word_llama), [{"messages": messages}], template)
        tokenizer = trainer.processing_class
        rows = list(trainer.train_dataset)
        assert len(rows) == len(begins)
        for row, begin in zip(rows, begins, strict=True):
            prompt = tokenizer.apply_chat_template(
                messages[:begin], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            answer = tokenizer(f"{messages[begin]['content']} <eos>", add_special_tokens=False)
            assert row["input_ids"] == prompt + answer["input_ids"]
            assert row["labels"] == [-100] * len(prompt) + answer["input_ids"]

    @pytest.mark.parametrize(
        ("positions", "packing"),
        [("f2+l2", False), ("f2+l2", True), ("l1", False), ("prompt", True), ("f3", False)],
    )
    def test_is_edited_where_generation_edits(self, word_llama, sft, positions, packing):
        model = wrapped(word_llama, positions=positions)
        rows = [{"messages": messages} for messages, _ in CHATS.values()]
        more = {"packing": True, "max_length": 64} if packing else {"max_length": 64}
        trainer = sft(model, rows, per_device_train_batch_size=16, **more)
        batch = next(iter(trainer.get_train_dataloader()))
        model.eval()
        trained = edited(model, lambda: trainer.model(**batch))
        served = []
        for messages, begins in CHATS.values():
            for begin in begins:
                prompt = trainer.processing_class.apply_chat_template(
                    messages[:begin],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                served.append(edited(model, lambda p=prompt: model.generate(**p, max_new_tokens=1)))
        ids, labels = batch["input_ids"].view(-1), batch["labels"].view(-1)
        edits = trained.view(-1)
        bos = trainer.processing_class.bos_token_id
        starts = (ids == bos).nonzero().flatten().tolist()
        assert len(starts) == len(served)
        columns = []
        for start in starts:
            end = start + int((labels[start:] != -100).nonzero()[0])
            columns.append(tuple(edits[start:end].tolist()))
        assert sorted(columns) == sorted(tuple(mask[0].tolist()) for mask in served)
        assert int(edits.sum()) == sum(int(mask.sum()) for mask in served)

    def test_from_other_formats(self, word_llama, sft):
        messages, _ = CHATS["two turns"]
        expected = list(
            sft(wrapped(copy.deepcopy(word_llama)), [{"messages": messages}]).train_dataset
        )
        old = [{"from": message["role"], "value": message["content"]} for message in messages]
        forms = (
            [{"conversations": old}],
            [{"prompt": messages[:1], "completion": messages[1:]}],
            IterableDataset.from_generator(lambda: iter([{"messages": messages}])),
        )
        for rows in forms:
            trainer = sft(wrapped(copy.deepcopy(word_llama)), rows)
            prepared = [
                {key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset
            ]
            assert prepared == [
                {key: row[key] for key in ("input_ids", "labels")} for row in expected
            ]
        later = sft(
            wrapped(copy.deepcopy(word_llama)),
            [{"prompt": messages[:3], "completion": messages[3:]}],
        )
        assert len(later.train_dataset) == 1

    def test_in_evaluation_too(self, word_llama, sft):
        rows = [{"messages": messages} for messages, _ in CHATS.values()]
        held = Dataset.from_list(rows[:2])
        trainer = sft(wrapped(word_llama), rows, max_steps=8, eval_dataset=held)
        assert len(trainer.eval_dataset) == 3
        trainer.train()
        logged = losses(trainer)
        assert logged[-1] < logged[0]
        assert trainer.evaluate(held)["eval_loss"] == pytest.approx(
            trainer.evaluate()["eval_loss"], abs=1e-6
        )

    def test_the_arguments_of_the_user_do_not_change(self, word_llama, word_tokenizer, tmp_path):
        args = SFTConfig(str(tmp_path), **{**SETTINGS, "assistant_only_loss": True})
        ReftSFTTrainer(
            wrapped(word_llama),
            args=args,
            train_dataset=Dataset.from_list([{"messages": CHATS["one turn"][0]}]),
            processing_class=chat_tokenizer(word_tokenizer, MARKED),
        )
        assert args.assistant_only_loss is True
        assert args.completion_only_loss is None

    def test_positions_without_a_prompt_need_no_split(self, word_llama, sft):
        trainer = sft(wrapped(word_llama, positions="all"), [{"messages": CHATS["two turns"][0]}])
        (row,) = trainer.train_dataset
        assert sum(label != -100 for label in row["labels"]) == 5


class TestRefused:
    def test_chats_without_answers(self, word_llama, sft):
        with pytest.raises(ValueError, match=r'"assistant" after another message; got .*user'):
            sft(wrapped(word_llama), [{"messages": [user("a")]}])

    @pytest.mark.parametrize(
        ("rows", "settings", "message"),
        [
            ([{"messages": CHATS["two turns"][0]}], {}, "assistant_only_loss must be True"),
            ([{"text": "a : one red"}], {}, "plain text"),
            ([{"body": "a : one red"}], {"dataset_text_field": "body"}, "plain text"),
            (
                [{"prompt": "a : one", "completion": " red"}],
                {"completion_only_loss": False},
                "completion_only_loss must be True or None",
            ),
            (
                [{"prompt": [user("a")], "completion": CHATS["two turns"][0][1:]}],
                {},
                "completion must be one answer",
            ),
            ([{"input_ids": [4, 5, 6]}], {}, "must have labels"),
            ([{"input_ids": [4, 5], "completion_mask": [0, 1]}], {}, "must have labels"),
            (
                [{"input_ids": [4, 5, 6, 7, 8], "labels": [-100, 5, -100, -100, 8]}],
                {},
                "example 0 has 2 runs",
            ),
            (
                [
                    {"input_ids": [4, 5], "assistant_masks": [0, 1]},
                    {"input_ids": [4, 5, 6, 7], "assistant_masks": [0, 1, 0, 1]},
                ],
                {},
                "example 1 has 2 runs",
            ),
            (
                [{"prompt": "a : one", "completion": " red"}],
                {"truncation_mode": "keep_end"},
                "truncation_mode",
            ),
            (
                [{"prompt": "a : one", "completion": " red"}],
                {"packing": True, "packing_strategy": "wrapped"},
                "packing_strategy",
            ),
            (
                [{"prompt": "a : one", "completion": " red"}],
                {"packing": True, "packing_strategy": "bfd_split"},
                "packing_strategy",
            ),
            (
                [{"prompt": "a : one", "completion": " red"}],
                {"eval_packing": True},
                "eval_packing=True needs",
            ),
        ],
    )
    def test_data_without_one_prompt(self, word_llama, sft, rows, settings, message):
        model = wrapped(word_llama)
        before = word_llama.config.to_dict()
        with pytest.raises(ValueError, match=message):
            sft(model, rows, assistant_only_loss=False, **settings)
        after = word_llama.config.to_dict()
        assert {key: after[key] for key in before if after[key] != before[key]} == {}

    def test_a_function_that_makes_text(self, word_llama, word_tokenizer, tmp_path):
        with pytest.raises(ValueError, match="formatting_func makes plain text"):
            ReftSFTTrainer(
                wrapped(word_llama),
                args=SFTConfig(str(tmp_path), **SETTINGS),
                train_dataset=Dataset.from_list([{"question": "a"}]),
                processing_class=word_tokenizer,
                formatting_func=lambda row: row["question"],
            )

    @pytest.mark.parametrize("way", ["TRL collator", "ReftDataCollator", "transformers"])
    def test_labels_of_several_answers_from_any_collator(
        self, word_llama, word_tokenizer, tmp_path, sft, way
    ):
        model = wrapped(word_llama)
        rows = [
            {"input_ids": [1, 5, 6, 7, 8, 2], "labels": [-100, -100, 6, -100, 8, 2]},
            {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]},
        ]
        if way == "TRL collator":
            skips = {"skip_prepare_dataset": True}
            trainer = sft(model, rows, assistant_only_loss=False, dataset_kwargs=skips)
        else:
            args = TrainingArguments(str(tmp_path), **SETTINGS)
            collator = ReftDataCollator(word_tokenizer, padding_free=way == "transformers")
            trainer = ReftTrainer(model, args, collator, rows)
        with pytest.raises(ValueError, match="has 2 runs of labels"):
            trainer.train()

    def test_prompt_lengths_allow_several_answers(self, word_llama, word_tokenizer, tmp_path):
        rows = [
            {
                "input_ids": [1, 5, 6, 7, 8, 2],
                "labels": [-100, -100, 6, -100, 8, 2],
                "prompt_lengths": 4,
            }
        ] * 2
        args = TrainingArguments(str(tmp_path), **SETTINGS)
        ReftTrainer(wrapped(word_llama), args, ReftDataCollator(word_tokenizer), rows).train()


class TestBatches:
    def test_packed_sequences_are_separate(self):
        batch = {
            "input_ids": torch.arange(8)[None],
            "labels": torch.tensor([[-100, 1, 2, -100, 4, -100, 6, 7]]),
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]),
        }
        check_batch(batch)
        check_batch({**batch, "cu_seq_lens_q": torch.tensor([0, 3, 5, 8])})
        with pytest.raises(ValueError, match="sequence 1 of a batch has 2 runs"):
            check_batch({**batch, "cu_seq_lens_q": torch.tensor([0, 3, 8])})

    def test_masked_columns_do_not_end_an_answer(self):
        batch = {
            "input_ids": torch.arange(6)[None],
            "labels": torch.tensor([[-100, 1, -100, 3, 4, -100]]),
            "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0]]),
        }
        check_batch(batch)
        with pytest.raises(ValueError, match="sequence 0 of a batch has 2 runs"):
            check_batch({**batch, "attention_mask": torch.ones(1, 6)})

    def test_labels_of_whole_sequences_are_not_checked(self):
        check_batch({"input_ids": torch.ones(2, 3), "labels": torch.tensor([1, 0])})
        check_batch({"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 4)})
        check_batch([{"prompt": "a"}])


def test_consecutive_messages_of_the_assistant_are_one_answer():
    assert answer_spans([user("a"), says("b"), says("c"), user("d")]) == [(1, 3)]
    assert answer_spans([says("a"), says("b"), user("c")]) == []
    assert answer_spans([says("a"), user("c"), says("d")], 2) == [(2, 3)]


def test_other_columns_are_repeated():
    messages, _ = CHATS["two turns"]
    made = split_conversations({"messages": [messages], "tools": ["x"], "kind": [7]})
    assert made["tools"] == ["x", "x"]
    assert made["kind"] == [7, 7]
