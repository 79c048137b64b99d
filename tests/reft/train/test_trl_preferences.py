"""TRL's DPOTrainer and KTOTrainer: the reference is the adapter as it was when training began."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, KTOConfig, SFTConfig
from trl_runs import (
    SETTINGS,
    UNMARKED,
    Prompted,
    all_of,
    chat_tokenizer,
    first_loss,
    log_probs,
    losses,
    parameters,
    plain_dpo,
    trained,
    wrapped,
)

from reft import ReftDPOTrainer, ReftKTOTrainer, ReftModel, ReftSFTTrainer


@pytest.fixture
def records(color_records):
    """With spaces around the answers: TRL joins texts, and the tokenizer splits them at spaces."""
    return [{**one, "completion": f" {one['completion']} "} for one in color_records]


@pytest.fixture
def dpo(word_tokenizer, records, tmp_path):
    def build(model, folder="run", rows=None, tokenizer=word_tokenizer, **settings):
        pairs = [
            {"prompt": one["prompt"], "chosen": one["completion"], "rejected": " no no "}
            for one in records
        ]
        return ReftDPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / folder), **{**SETTINGS, "beta": 0.5, **settings}),
            train_dataset=Dataset.from_list(rows or pairs),
            processing_class=tokenizer,
        )

    return build


@pytest.fixture
def kto(word_tokenizer, records, tmp_path):
    def build(model, folder="run", **settings):
        rows = [{**one, "label": index % 3 > 0} for index, one in enumerate(records)]
        return ReftKTOTrainer(
            model,
            args=KTOConfig(str(tmp_path / folder), **{**SETTINGS, "beta": 0.5, **settings}),
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer,
        )

    return build


class TestReference:
    @pytest.mark.parametrize(
        "changes",
        [
            {"intervention": "noreft", "positions": "prompt"},
            {"intervention": "direft", "positions": "l1", "dropout": 0.3},
            {"intervention": "lobireft", "tied": False},
            {"modules_to_save": ["lm_head"]},
            {"component": "mlp_output", "layers": [1]},
        ],
        ids=str,
    )
    def test_the_loss_begins_at_ln_2(self, word_llama, dpo, changes):
        trainer = dpo(trained(word_llama, **changes))
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)

    @pytest.mark.parametrize("before", [False, True])
    def test_of_an_adapter_that_is_drawn_from_the_seed(self, word_llama, dpo, before):
        trainer = dpo(wrapped(word_llama), precompute_ref_log_probs=before, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)

    def test_of_an_adapter_that_sft_has_just_trained(
        self, word_llama, word_tokenizer, records, dpo, tmp_path
    ):
        model = wrapped(word_llama, dropout=0.1)
        ReftSFTTrainer(
            model,
            args=SFTConfig(str(tmp_path / "sft"), **SETTINGS),
            train_dataset=Dataset.from_list(records),
            processing_class=word_tokenizer,
        ).train()
        start = copy.deepcopy(model).eval()
        trainer = dpo(model, max_steps=6)
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)
        trainer.train()
        found = losses(trainer)
        assert found[0] == pytest.approx(math.log(2), abs=1e-4)
        assert found[-1] < 0.6
        model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, all_of(trainer))
            expected = plain_dpo(model, start, word_tokenizer, records, 0.5)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    def test_of_an_adapter_that_was_loaded(
        self, word_llama, word_tokenizer, records, dpo, tmp_path
    ):
        base = copy.deepcopy(word_llama)
        trained(word_llama).save_pretrained(tmp_path / "sft")
        model = ReftModel.from_pretrained(base, tmp_path / "sft", is_trainable=True)
        start = copy.deepcopy(model).eval()
        trainer = dpo(model, per_device_train_batch_size=12)
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)
        with torch.no_grad():
            model.reft.adapter("default").bias.add_(0.3)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        got = {n: p.grad.clone() for n, p in model.reft.adapter("default").named_parameters()}
        model.zero_grad()
        expected = plain_dpo(model, start, word_tokenizer, records, 0.5)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert abs(float(loss) - math.log(2)) > 1e-3
        for name, one in model.reft.adapter("default").named_parameters():
            torch.testing.assert_close(got[name], one.grad, rtol=1e-3, atol=1e-5)

    def test_is_no_second_model(self, word_llama, dpo):
        base = copy.deepcopy(word_llama.state_dict())
        model = wrapped(word_llama, modules_to_save=["lm_head"])
        before = {name: one.shape for name, one in model.state_dict().items()}
        trainer = dpo(model, max_steps=3)
        assert list(trainer.ref_model.parameters()) == []
        trainer.train()
        assert {name: one.shape for name, one in model.state_dict().items()} == before
        assert list(model.configs) == ["default"]
        assert model.reft.adapter("default").bias.requires_grad
        assert word_llama.lm_head.weight.requires_grad
        state = model.unload().state_dict()
        assert all(torch.equal(state[name], value) for name, value in base.items())

    def test_leaves_the_model_as_it_was_when_it_fails(self, word_llama, dpo):
        model = trained(word_llama, modules_to_save=["lm_head"])
        trainer = dpo(model)
        adapter, head = model.reft.adapter("default"), word_llama.lm_head
        with pytest.raises(ValueError, match="input_ids"):
            trainer.ref_model(input_ids=None)
        assert model.reft.adapter("default") is adapter
        assert word_llama.lm_head is head
        assert model.active_adapter == "default"

    @pytest.mark.parametrize("component", ["block_output", "mlp_output"])
    def test_with_checkpointing(self, word_llama, dpo, component):
        """TRL switches checkpointing off and on around every reference forward."""
        results = []
        for on in (False, True):
            model = trained(copy.deepcopy(word_llama), component=component)
            trainer = dpo(model, max_steps=3, gradient_checkpointing=on)
            trainer.train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("build", ["dpo", "kto"])
    def test_values_computed_before(self, word_llama, request, build):
        results = []
        for before in (False, True):
            model = trained(copy.deepcopy(word_llama), modules_to_save=["lm_head"])
            trainer = request.getfixturevalue(build)(
                model, max_steps=2, precompute_ref_log_probs=before
            )
            trainer.train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    def test_is_told_by_its_values(self, word_llama):
        """By what TRL finds reference values again that it computed before."""
        from trl.trainer.utils import hash_module

        from reft.train.reference_model import ReferenceModel

        def told(model):
            return hash_module(ReferenceModel(model))

        model = wrapped(word_llama)
        reference = ReferenceModel(model)
        first = hash_module(reference)
        assert told(model) == first
        with torch.no_grad():
            model.reft.adapter("default").bias.add_(1)
        assert hash_module(reference) == first
        assert told(model) != first
        second = told(model)
        with torch.no_grad():
            word_llama.lm_head.weight.add_(1)
        assert told(model) != second
        assert told(wrapped(without(word_llama), positions="f1+l1")) != told(
            wrapped(without(word_llama))
        )


def without(base):
    """A copy of a base that has adapters, without them."""
    base = copy.deepcopy(base)
    del base.reft
    return base


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


class TestResume:
    @pytest.mark.parametrize("build", ["dpo", "kto"])
    @pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
    def test_has_the_reference_of_the_first_start(
        self, word_llama, request, tmp_path, build, changes
    ):
        make = request.getfixturevalue(build)
        second, other = copy.deepcopy(word_llama), copy.deepcopy(word_llama)
        whole = make(trained(word_llama, **changes), **SAVES)
        whole.train()
        checkpoint = tmp_path / "run/checkpoint-2"
        assert (checkpoint / "reference/adapter_model.safetensors").exists()
        again = make(wrapped(second, **changes), "again", **SAVES)
        again.train(resume_from_checkpoint=str(checkpoint))
        expected, got = (parameters(one._reft_model()) for one in (whole, again))
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        again.save_model(str(tmp_path / "out"))
        assert not (tmp_path / "out/reference").exists()
        loaded = ReftModel.from_pretrained(other, tmp_path / "out")
        for name, value in parameters(loaded.reft.adapter("default")).items():
            if name != "free":
                assert torch.equal(value, expected[f"base_model.reft.adapters.default.{name}"])

    def test_of_a_run_that_kept_none(self, word_llama, dpo, tmp_path, word_tokenizer, records):
        """As releases before wrote them: there the reference was the base."""
        import shutil

        base, second = copy.deepcopy(word_llama), copy.deepcopy(word_llama)
        dpo(trained(word_llama), **SAVES).train()
        shutil.rmtree(tmp_path / "run/checkpoint-2/reference")
        again = dpo(trained(second), "again", **SAVES)
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
        model = again._reft_model().eval()
        with torch.no_grad():
            loss = again.compute_loss(again.model, all_of(again))
            expected = plain_dpo(model, Prompted(base), word_tokenizer, records, 0.5)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    def test_values_computed_before_must_be_of_the_same(self, word_llama, dpo, tmp_path):
        second = copy.deepcopy(word_llama)
        third = copy.deepcopy(word_llama)
        settings = {**SAVES, "precompute_ref_log_probs": True}
        dpo(trained(word_llama), **settings).train()
        checkpoint = str(tmp_path / "run/checkpoint-2")
        dpo(trained(third), "third", **settings).train(resume_from_checkpoint=checkpoint)
        model = trained(second, seed=6)
        before = parameters(model.reft)
        with pytest.raises(ValueError, match="used another reference than that of the run"):
            dpo(model, "again", **settings).train(
                resume_from_checkpoint=checkpoint, allow_changes=True
            )
        after = parameters(model.reft)
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_a_damaged_reference_is_refused(self, word_llama, dpo, tmp_path):
        second = copy.deepcopy(word_llama)
        dpo(trained(word_llama), **SAVES).train()
        path = tmp_path / "run/checkpoint-2/reference/adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="truncated"):
            dpo(wrapped(second), "again", **SAVES).train(
                resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")
            )


class TestKTO:
    def test_the_loss(self, word_llama, word_tokenizer, records, kto):
        """arXiv 2402.01306, eq. 8, written out, with TRL's estimate of z: other answers."""
        model = trained(word_llama)
        start = copy.deepcopy(model).eval()
        trainer = kto(model, per_device_train_batch_size=12)
        with torch.no_grad():
            model.reft.adapter("default").bias.add_(0.3)
        model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, all_of(trainer))
            ratios, others = [], []
            for index, record in enumerate(records):
                other = records[index - 1]["completion"]
                for found, answer in ((ratios, record["completion"]), (others, other)):
                    ours, theirs = (
                        log_probs(one, word_tokenizer, record["prompt"], answer)
                        for one in (model, start)
                    )
                    found.append(ours - theirs)
            z = torch.stack(others).mean().clamp(min=0)
            signs = torch.tensor([1.0 if index % 3 > 0 else -1.0 for index in range(12)])
            expected = (1 - torch.sigmoid(0.5 * signs * (torch.stack(ratios) - z))).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
    def test_it_begins_at_a_half_and_learns(self, word_llama, kto, loss_type):
        model = trained(word_llama, dropout=0.2)
        trainer = kto(model, loss_type=loss_type, max_steps=12)
        assert first_loss(trainer) == pytest.approx(0.5, abs=1e-5)
        trainer.train()
        assert losses(trainer)[-1] < 0.45


def says(*texts):
    speakers = ("assistant", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(speakers, texts, strict=False)]


class TestChats:
    def test_prompts_of_several_turns(self, word_llama, word_tokenizer, dpo):
        tokenizer = chat_tokenizer(word_tokenizer, UNMARKED)
        before = [{"role": "user", "content": "a"}, *says("red", "b")]
        rows = [{"prompt": before, "chosen": says("blue"), "rejected": says("no")}] * 2
        implicit = [{"chosen": [*before, *says("blue")], "rejected": [*before, *says("no")]}] * 2
        found = []
        for form in (rows, implicit):
            trainer = dpo(wrapped(copy.deepcopy(word_llama)), rows=form, tokenizer=tokenizer)
            found.append(trainer.train_dataset[0])
        served = tokenizer.apply_chat_template(before, add_generation_prompt=True)
        for row in found:
            assert row["prompt_ids"] == served["input_ids"]

    @pytest.mark.parametrize("name", ["chosen", "rejected"])
    def test_answers_of_several_turns_are_refused(self, word_llama, word_tokenizer, dpo, name):
        before = [{"role": "user", "content": "a"}]
        row = {"prompt": before, "chosen": says("blue"), "rejected": says("no")}
        row[name] = says("blue", "c", "red")
        with pytest.raises(ValueError, match=f"{name} must be one answer of the assistant"):
            dpo(wrapped(word_llama), rows=[row], tokenizer=chat_tokenizer(word_tokenizer, UNMARKED))


class TestRefused:
    @pytest.mark.parametrize("build", ["dpo", "kto"])
    def test_a_reference_that_moves(self, word_llama, request, build):
        with pytest.raises(ValueError, match="sync_ref_model must be False"):
            request.getfixturevalue(build)(wrapped(word_llama), sync_ref_model=True)

    @pytest.mark.parametrize("cls", [ReftDPOTrainer, ReftKTOTrainer])
    def test_other_models(self, word_llama, cls):
        model = wrapped(word_llama)
        with pytest.raises(TypeError, match="ref_model must be None"):
            cls(model, ref_model=model)
        with pytest.raises(TypeError, match=f"{cls.__name__} trains a ReftModel"):
            cls(model.unload())
        model = wrapped(word_llama)
        model.delete_adapter("default")
        with pytest.raises(ValueError, match="active adapter"):
            cls(model)

    def test_layers_of_peft(self, word_llama, dpo):
        peft = pytest.importorskip("peft")
        base = peft.get_peft_model(word_llama, peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="no layers of PEFT"):
            dpo(wrapped(base))

    def test_prompts_that_are_cut_at_their_start(self, word_llama, dpo):
        with pytest.raises(ValueError, match="truncation_mode"):
            dpo(wrapped(word_llama), truncation_mode="keep_end")
        dpo(wrapped(without(word_llama), positions="l2"), truncation_mode="keep_end")
