"""Runs without effect are refused at their start or first batch, with the reason."""

from __future__ import annotations

import random

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from tiny_models import bert, llama, padded
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from reft import ReftConfig, ReftModel, ReftTrainer, get_reft_model

PLAIN = [{"input_ids": [1, 5, 6, 7, 8, 9], "labels": [1, 5, 6, 7, 8, 9]}] * 8
ANSWERED = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, -100, -100, 8, 9]}


def state(model: ReftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def wrapped(base=None, **changes) -> ReftModel:
    """A new adapter that the Trainer does not initialise again."""
    config = ReftConfig(**{"rank": 2, "positions": "f2+l2", **changes})
    generator = torch.Generator().manual_seed(0)
    return get_reft_model(llama() if base is None else base, config, generator=generator)


def joined(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def trainer_of(tmp_path):
    def build(
        data, *, model=None, collate=joined, kind=ReftTrainer, optimizers=(None, None), **arguments
    ):
        settings = {
            "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        if model is None:
            model = wrapped()
        return kind(
            model, TrainingArguments(str(tmp_path / "run"), **{**settings, **arguments}),
            collate, data, optimizers=optimizers,
        )  # fmt: skip

    return build


# ------------------------------------------------------------------ parameters


def frozen(model):
    model.set_adapter("default", inference_mode=True)


def deleted(model):
    model.delete_adapter("default")


def without_gradients(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (frozen, "adapter 'default' is frozen: load it with is_trainable=True, or call model.set_"),
        (without_gradients, "adapter 'default' is frozen"),
        (deleted, "no adapter is active: model.set_adapter"),
    ],
)
def test_nothing_that_requires_a_gradient(trainer_of, change, words, tmp_path):
    model = wrapped()
    change(model)
    trainer = trainer_of([ANSWERED] * 8, model=model, save_strategy="steps")
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert not list((tmp_path / "run").iterdir())
    assert trainer.state.global_step == 0


def test_an_adapter_loaded_for_inference(trainer_of, tmp_path):
    get_reft_model(llama(), ReftConfig(rank=2)).save_pretrained(tmp_path / "adapter")
    loaded = ReftModel.from_pretrained(llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="load it with is_trainable=True"):
        trainer_of([ANSWERED] * 8, model=loaded).train()
    again = ReftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    before = state(again)
    trainer_of([ANSWERED] * 8, model=again).train()
    assert not same(before, state(again))


def test_a_frozen_adapter_beside_the_trained_one(trainer_of, tmp_path):
    get_reft_model(llama(), ReftConfig(rank=2)).save_pretrained(tmp_path / "adapter")
    model = wrapped()
    model.load_adapter(tmp_path / "adapter", "other")
    trainer_of([ANSWERED] * 8, model=model, max_steps=1).train()


def test_an_optimizer_of_other_parameters(trainer_of):
    model = wrapped()
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds no trainable parameter"):
        trainer_of([ANSWERED] * 8, model=model, optimizers=(other, None)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = state(model)
    trainer_of([ANSWERED] * 8, model=model, optimizers=(optimizer, None)).train()
    assert not same(before, state(model))


def test_frozen_edits_beside_lora_give_a_warning(trainer_of, caplog):
    base = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = wrapped(base)
    model.set_adapter("default", inference_mode=True)
    trainer_of([ANSWERED] * 8, model=model, max_steps=1).train()
    assert "the edits of adapter 'default' are frozen" in caplog.text


def test_a_model_of_model_init_is_checked(tmp_path):
    def make():
        model = wrapped()
        model.set_adapter("default", inference_mode=True)
        return model

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = ReftTrainer(None, arguments, joined, [ANSWERED] * 8, model_init=make)
    with pytest.raises(ValueError, match="adapter 'default' is frozen"):
        trainer.train()


# ------------------------------------------------------------------ the first batch

SHORT = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, 5, 6, 7, 8, 9]}
DATA = {
    "no prompt": (PLAIN, {}, r"labels count from the first token.*completion with reft\.ReftData"),
    "short prompts": ([SHORT] * 8, {}, r"longest prompt has 1 token\(s\), too short for .*'f2.l2'"),
    "no lengths": (
        [{**ANSWERED, "prompt_lengths": 0}] * 8, {}, "prompt_lengths are all 0; give the number"),
    "no positions": (
        [{**ANSWERED, "edit_positions": [-1, -1]}] * 8, {}, "edit_positions are empty; give each"),
    "all masked": (
        [{**ANSWERED, "attention_mask": [0] * 6}] * 8, {}, "the labels count from|no attended"),
    "accumulated": (PLAIN, {"gradient_accumulation_steps": 4}, "labels count from the first"),
    "checkpointing": (PLAIN, {"gradient_checkpointing": True}, "labels count from the first"),
    "bfloat16": (PLAIN, {"bf16": True}, "labels count from the first"),
    "compiled": (
        PLAIN, {"torch_compile": True, "torch_compile_backend": "eager"}, "labels count from"),
    "weight decay": (PLAIN, {"weight_decay": 0.5}, "labels count from"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("name", DATA)
def test_data_without_an_edited_token(trainer_of, name):
    data, arguments, words = DATA[name]
    trainer = trainer_of(data, **arguments)
    before = state(trainer.model)
    with pytest.raises(ValueError, match=f"nothing would be trained by the .*{words}"):
        trainer.train()
    assert same(before, state(trainer.model))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.state.global_step == 0


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("name", ["accumulated", "checkpointing", "bfloat16", "compiled"])
def test_the_same_settings_with_prompts_train(trainer_of, name):
    _, arguments, _ = DATA[name]
    trainer = trainer_of([ANSWERED] * 8, max_steps=1, **arguments)
    before = state(trainer.model)
    trainer.train()
    assert not same(before, state(trainer.model))
    assert trainer.steps_trained == 1


def test_whole_texts(trainer_of, word_tokenizer, word_llama):
    """Every token is a label, as in pretraining."""
    texts = [{**word_tokenizer("a : one green")} for _ in range(8)]
    collate = DataCollatorForLanguageModeling(word_tokenizer, mlm=False)
    model = get_reft_model(word_llama, ReftConfig(rank=2, positions="f1+l1"))
    with pytest.raises(ValueError, match="not on plain text or with DataCollatorForLanguageMod"):
        trainer_of(Dataset.from_list(texts), model=model, collate=collate).train()


def test_labels_that_count_nothing_are_reported(trainer_of, caplog):
    trainer_of([{**ANSWERED, "labels": [-100] * 6}] * 8, max_steps=1).train()
    assert "every label of the first batch is -100" in caplog.text
    caplog.clear()
    trainer_of([ANSWERED] * 8, max_steps=1).train()
    assert "-100" not in caplog.text


@pytest.mark.parametrize("positions", ["all", "f2+l2"])
def test_positions_that_need_no_prompt(trainer_of, positions):
    trainer = trainer_of(
        PLAIN, model=get_reft_model(llama(), ReftConfig(rank=2, positions=positions)), max_steps=1
    )
    if positions == "all":
        trainer.train()
    else:
        with pytest.raises(ValueError, match="nothing would be trained"):
            trainer.train()


def test_another_adapter_in_every_example(trainer_of):
    model = wrapped()
    model.add_adapter("other", ReftConfig(rank=2, positions="f2+l2"))

    def collate(rows):
        names = ["other", "__base__", "other", "__base__"]
        return {**joined(rows), "adapter_names": names[: len(rows)]}

    with pytest.raises(ValueError, match="check adapter_names, 'default' is the adapter that"):
        trainer_of([ANSWERED] * 8, model=model, collate=collate).train()


def test_switched_off(trainer_of):
    trainer = trainer_of([ANSWERED] * 8)
    with (
        trainer.model.disable_adapter(),
        pytest.raises(ValueError, match="switched off, inside disable_adapter"),
    ):
        trainer.train()


def test_an_encoder_has_prompts_without_labels_of_tokens(trainer_of):
    ids, mask, _ = padded([5, 3, 6, 4], "right")
    data = [
        {"input_ids": row.tolist(), "attention_mask": attended.tolist(), "labels": 1}
        for row, attended in zip(ids, mask, strict=True)
    ]
    model = wrapped(bert(), positions="f1")
    before = state(model)
    trainer_of(data, model=model, max_steps=1).train()
    assert not same(before, state(model))
    masked = [{**row, "attention_mask": [0] * len(row["attention_mask"])} for row in data]
    model = wrapped(bert(), positions="f1")
    with pytest.raises(ValueError, match="no attended token"):
        trainer_of(masked, model=model, max_steps=1).train()


def test_modules_to_save_are_trained_with_a_warning(trainer_of, caplog):
    model = wrapped(modules_to_save=["lm_head"])
    before = state(model)
    trainer_of(PLAIN, model=model, max_steps=1).train()
    assert "trains modules_to_save or PEFT's layers and no edit: the labels count" in caplog.text
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lm_head" in name for name in moved)


def test_evaluation_needs_no_trainable_parameters(trainer_of):
    trainer = trainer_of(PLAIN)
    frozen(trainer.model)
    trainer.eval_dataset = PLAIN
    assert np.isfinite(trainer.evaluate()["eval_loss"])


# ------------------------------------------------------------------ the search in other batches


class InOrder(ReftTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Drawing(list):
    """Examples that draw random numbers of every kind when they are read."""

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return super().__getitem__(index)


@pytest.mark.parametrize("kind", [Drawing, Dataset.from_list])
def test_other_batches_may_have_edited_tokens(trainer_of, caplog, kind):
    data = kind([*PLAIN[:4], *[ANSWERED] * 4])
    trainer = trainer_of(data, kind=InOrder)
    before = state(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "the first batch trains nothing" in caplog.text
    assert not same(before, state(trainer.model))


def test_the_training_data_are_sampled(trainer_of):
    data = [PLAIN[0]] * 4000
    data[2000] = ANSWERED
    trainer_of(data, kind=InOrder, max_steps=1).train()
    data[2000], data[2001] = PLAIN[0], ANSWERED  # not in the sample
    with pytest.raises(ValueError, match="nothing would be trained"):
        trainer_of(data, kind=InOrder, max_steps=1).train()


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_the_first_examples_of_a_stream_are_checked(trainer_of, caplog):
    trainer_of(Stream([*PLAIN[:4], *[ANSWERED] * 4])).train()
    assert "the first batch trains nothing" in caplog.text
    trainer = trainer_of(Stream(PLAIN * 100), max_steps=30, logging_steps=1)
    with pytest.raises(ValueError, match="nothing would be trained"):
        trainer.train()
    assert trainer.state.global_step == 64 // 4 - 1


def test_the_search_does_not_change_the_run(trainer_of, monkeypatch):
    """Bit for bit: dropout and the order of the data draw the same random numbers."""
    results = []
    for look in (True, False):
        torch.manual_seed(0)
        model = wrapped(dropout=0.3)
        if not look:
            monkeypatch.setattr("reft.train.training_checks._others_edit", lambda *args: True)
        trainer_of([*PLAIN[:4], *[ANSWERED] * 4], model=model, kind=InOrder, max_steps=4).train()
        results.append(state(model))
    assert same(*results)


def test_only_the_first_batch_is_checked(trainer_of, monkeypatch):
    """Later steps do not synchronise."""
    from reft.train import training_checks

    looked = []
    real = training_checks._edits_trained
    monkeypatch.setattr(
        training_checks, "_edits_trained", lambda plans: looked.append(1) or real(plans)
    )
    trainer = trainer_of([ANSWERED] * 8, max_steps=2)
    trainer.train()
    assert looked == [1]
    trainer.train()  # a new run is checked again
    assert looked == [1, 1]
