"""The reference of TRL's preference trainers: the adapter as it was when training began."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import SFTConfig
from trl.trainer.utils import hash_module
from trl_runs import (
    SETTINGS,
    Prompted,
    all_of,
    first_loss,
    losses,
    parameters,
    plain_dpo,
    trained,
    wrapped,
)

from reft import ReftModel, ReftSFTTrainer
from reft.train.reference_model import ReferenceModel


def without(base):
    """A copy of a base that has adapters, without them."""
    base = copy.deepcopy(base)
    del base.reft
    return base


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
    def test_of_an_adapter_initialised_from_the_seed(self, word_llama, dpo, before):
        trainer = dpo(wrapped(word_llama), precompute_ref_log_probs=before, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)

    def test_of_an_adapter_trained_with_sft_before(
        self, word_llama, word_tokenizer, spaced_records, dpo, tmp_path
    ):
        model = wrapped(word_llama, dropout=0.1)
        ReftSFTTrainer(
            model,
            args=SFTConfig(str(tmp_path / "sft"), **SETTINGS),
            train_dataset=Dataset.from_list(spaced_records),
            processing_class=word_tokenizer,
        ).train()
        start = copy.deepcopy(model).eval()
        trainer = dpo(model, max_steps=6)
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)
        trainer.train()
        logged = losses(trainer)
        assert logged[0] == pytest.approx(math.log(2), abs=1e-4)
        assert logged[-1] < 0.6
        model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, all_of(trainer))
            expected = plain_dpo(model, start, word_tokenizer, spaced_records, 0.5)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    def test_of_a_loaded_adapter(self, word_llama, word_tokenizer, spaced_records, dpo, tmp_path):
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
        expected = plain_dpo(model, start, word_tokenizer, spaced_records, 0.5)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert abs(float(loss) - math.log(2)) > 1e-3
        for name, parameter in model.reft.adapter("default").named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)

    def test_is_no_second_model(self, word_llama, dpo):
        base = copy.deepcopy(word_llama.state_dict())
        model = wrapped(word_llama, modules_to_save=["lm_head"])
        before = {name: tensor.shape for name, tensor in model.state_dict().items()}
        trainer = dpo(model, max_steps=3)
        assert list(trainer.ref_model.parameters()) == []
        trainer.train()
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
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

    def test_with_checkpointing(self, word_llama, dpo):
        """TRL disables and enables checkpointing around every reference forward."""
        results = []
        for on in (False, True):
            model = trained(copy.deepcopy(word_llama), component="mlp_output")
            trainer = dpo(model, max_steps=3, gradient_checkpointing=on)
            trainer.train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("build", ["dpo", "kto"])
    def test_precomputed_values(self, word_llama, request, build):
        results = []
        for before in (False, True):
            model = trained(copy.deepcopy(word_llama), modules_to_save=["lm_head"])
            trainer = request.getfixturevalue(build)(
                model, max_steps=1, precompute_ref_log_probs=before
            )
            trainer.train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    def test_its_hash_depends_on_its_values(self, word_llama):
        """TRL finds its precomputed reference values again by this hash."""

        def hash_of(model):
            return hash_module(ReferenceModel(model))

        model = wrapped(word_llama)
        reference = ReferenceModel(model)
        first = hash_module(reference)
        assert hash_of(model) == first
        with torch.no_grad():
            model.reft.adapter("default").bias.add_(1)
        assert hash_module(reference) == first
        assert hash_of(model) != first
        second = hash_of(model)
        with torch.no_grad():
            word_llama.lm_head.weight.add_(1)
        assert hash_of(model) != second
        assert hash_of(wrapped(without(word_llama), positions="f1+l1")) != hash_of(
            wrapped(without(word_llama))
        )


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


class TestResume:
    @pytest.mark.parametrize(
        ("build", "changes"), [("dpo", {"modules_to_save": ["lm_head"]}), ("kto", {})]
    )
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
        expected, got = (parameters(trainer._reft_model()) for trainer in (whole, again))
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        again.save_model(str(tmp_path / "out"))
        assert not (tmp_path / "out/reference").exists()
        loaded = ReftModel.from_pretrained(other, tmp_path / "out")
        for name, value in parameters(loaded.reft.adapter("default")).items():
            if name != "free":
                assert torch.equal(value, expected[f"base_model.reft.adapters.default.{name}"])

    def test_of_a_run_that_saved_no_reference(
        self, word_llama, dpo, tmp_path, word_tokenizer, spaced_records
    ):
        """Earlier versions saved no reference, it was the base."""
        base, second = copy.deepcopy(word_llama), copy.deepcopy(word_llama)
        dpo(trained(word_llama), **SAVES).train()
        shutil.rmtree(tmp_path / "run/checkpoint-2/reference")
        again = dpo(trained(second), "again", **SAVES)
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
        model = again._reft_model().eval()
        with torch.no_grad():
            loss = again.compute_loss(again.model, all_of(again))
            expected = plain_dpo(model, Prompted(base), word_tokenizer, spaced_records, 0.5)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    def test_precomputed_values_need_the_same_reference(self, word_llama, dpo, tmp_path):
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
