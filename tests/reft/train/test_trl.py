"""TRL's SFTTrainer: prompts end where they should, and the adapter alone is trained and saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import SFTConfig
from trl_runs import SETTINGS, losses, parameters, wrapped

from reft import ReftModel, ReftSFTTrainer


@pytest.fixture
def records(color_records):
    """With spaces around the answers: TRL joins texts, and the tokenizer splits them at spaces."""
    return [{**one, "completion": f" {one['completion']} "} for one in color_records]


@pytest.fixture
def sft(word_tokenizer, records, tmp_path):
    def build(model, folder="run", **settings):
        return ReftSFTTrainer(
            model,
            args=SFTConfig(str(tmp_path / folder), **{**SETTINGS, **settings}),
            train_dataset=Dataset.from_list(records),
            eval_dataset=Dataset.from_list(records[:4]),
            processing_class=word_tokenizer,
        )

    return build


class TestSFT:
    def test_the_loss_goes_down_and_the_base_stays(self, word_llama, sft):
        base = copy.deepcopy(word_llama.state_dict())
        model = wrapped(word_llama)
        trainer = sft(model, max_steps=8)
        trainer.train()
        found = losses(trainer)
        assert found[-1] < found[0] / 2
        assert trainer.evaluate()["eval_loss"] < found[0]
        state = model.unload().state_dict()
        assert all(torch.equal(state[name], value) for name, value in base.items())

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_a_step_is_the_gradient_of_the_plain_loss(
        self, word_llama, word_tokenizer, records, sft, padding_free
    ):
        """Against the model's own loss on the same records, with the prompts said by hand."""
        model = wrapped(word_llama)
        more = {"padding_free": True, "max_length": None} if padding_free else {}
        trainer = sft(model, max_steps=1, per_device_train_batch_size=12, **more)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("position_ids" in batch) == padding_free
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        got = {n: p.grad.clone() for n, p in model.reft.adapter("default").named_parameters()}
        model.zero_grad()
        total, count = 0.0, 0
        for record in records:
            prompt = word_tokenizer(record["prompt"])["input_ids"]
            answer = word_tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt, *answer, word_tokenizer.eos_token_id]])
            logits = model(ids, prompt_lengths=[len(prompt)]).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(
                logits, ids[0, len(prompt) :], reduction="sum"
            )
            count += len(answer) + 1
        (total / count).backward()
        torch.testing.assert_close(loss, (total / count), rtol=1e-4, atol=1e-5)
        for name, one in model.reft.adapter("default").named_parameters():
            torch.testing.assert_close(got[name], one.grad, rtol=1e-3, atol=1e-5)

    def test_checkpoints_hold_the_adapter_and_resume_bit_for_bit(self, word_llama, sft, tmp_path):
        base = copy.deepcopy(word_llama)
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole = sft(wrapped(word_llama, dropout=0.1), **settings)
        whole.train()
        checkpoint = tmp_path / "run/checkpoint-2"
        files = {path.name for path in checkpoint.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert not files & {"model.safetensors", "config.json", "pytorch_model.bin"}
        again = sft(wrapped(base, dropout=0.1), "again", **settings)
        again.train(resume_from_checkpoint=str(checkpoint))
        expected, got = (parameters(one._reft_model().reft) for one in (whole, again))
        assert all(torch.equal(got[name], value) for name, value in expected.items())

    def test_what_is_saved_is_an_adapter(self, word_llama, sft, tmp_path, word_tokenizer):
        base = copy.deepcopy(word_llama)
        model = wrapped(word_llama)
        trainer = sft(model)
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        loaded = ReftModel.from_pretrained(base, tmp_path / "out")
        ids = word_tokenizer("a : one", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_and_accumulation(self, word_llama, sft, reentrant):
        results = []
        for settings in (
            {"per_device_train_batch_size": 4},
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            },
        ):
            model = wrapped(copy.deepcopy(word_llama), component="mlp_output")
            sft(model, max_steps=2, **settings).train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    def test_another_model_is_refused(self, word_llama, sft):
        with pytest.raises(TypeError, match="ReftSFTTrainer trains a ReftModel"):
            sft(word_llama)


def test_importing_the_package_does_not_import_trl():
    import subprocess
    import sys

    code = "import sys, reft, reft.train.trainer; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert Path(__file__).name == "test_trl.py"
