"""TRL's DPOTrainer and KTOTrainer: losses, chats, refused arguments."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import (
    UNMARKED,
    all_of,
    chat_tokenizer,
    first_loss,
    log_probs,
    losses,
    trained,
    wrapped,
)

from reft import ReftDPOTrainer, ReftKTOTrainer


class TestKTO:
    def test_the_loss(self, word_llama, word_tokenizer, spaced_records, kto):
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
            for index, record in enumerate(spaced_records):
                other = spaced_records[index - 1]["completion"]
                for log_ratios, answer in ((ratios, record["completion"]), (others, other)):
                    ours, theirs = (
                        log_probs(policy, word_tokenizer, record["prompt"], answer)
                        for policy in (model, start)
                    )
                    log_ratios.append(ours - theirs)
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
        prepared = []
        for form in (rows, implicit):
            trainer = dpo(wrapped(copy.deepcopy(word_llama)), rows=form, tokenizer=tokenizer)
            prepared.append(trainer.train_dataset[0])
        served = tokenizer.apply_chat_template(before, add_generation_prompt=True)
        for row in prepared:
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
        model = wrapped(word_llama)
        with pytest.raises(ValueError, match="truncation_mode"):
            dpo(model, truncation_mode="keep_end")
        dpo(wrapped(model.unload(), positions="l2"), truncation_mode="keep_end")
