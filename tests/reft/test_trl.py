"""TRL's trainers: the prompts end where they should, the adapter alone is trained and saved, and
the reference of DPO is the model without it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, SFTConfig

from reft import ReftConfig, ReftDPOTrainer, ReftModel, ReftSFTTrainer, get_reft_model

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}


def wrapped(base, **changes):
    torch.manual_seed(1)
    return get_reft_model(base, ReftConfig(**{"rank": 4, "positions": "f2+l2", **changes}))


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


def parameters(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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
        got = {n: p.grad.clone() for n, p in model.reft.bank("default").named_parameters()}
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
        for name, one in model.reft.bank("default").named_parameters():
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


@pytest.fixture
def dpo(word_tokenizer, records, tmp_path):
    def build(model, folder="run", **settings):
        pairs = [
            {"prompt": one["prompt"], "chosen": one["completion"], "rejected": " no no "}
            for one in records
        ]
        return ReftDPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / folder), **{**SETTINGS, "beta": 0.5, **settings}),
            train_dataset=Dataset.from_list(pairs),
            processing_class=word_tokenizer,
        )

    return build


def log_probs(model, tokenizer, prompt, answer, **call):
    """Σ log p of an answer and the end token after a prompt, one sequence at a time."""
    prompt = tokenizer(prompt)["input_ids"]
    answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    logits = model(ids, **call).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, ids[0, len(prompt) :, None]).sum()


def plain_dpo(model, base, tokenizer, records, beta):
    """The loss of DPO (arXiv 2305.18290, eq. 7), written out; ``base`` is a separate model."""
    terms = []
    for record in records:
        ratios = []
        for answer in (record["completion"], " no no "):
            n = len(tokenizer(record["prompt"])["input_ids"])
            ours = log_probs(model, tokenizer, record["prompt"], answer, prompt_lengths=[n])
            with torch.no_grad():
                theirs = log_probs(base, tokenizer, record["prompt"], answer)
            ratios.append(ours - theirs)
        terms.append(-logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(terms).mean()


class TestDPO:
    def test_the_loss_and_its_gradient(self, word_llama, word_tokenizer, records, dpo):
        base = copy.deepcopy(word_llama)
        model = wrapped(word_llama)
        trainer = dpo(model, per_device_train_batch_size=12)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        got = {n: p.grad.clone() for n, p in model.reft.bank("default").named_parameters()}
        model.zero_grad()
        expected = plain_dpo(model, base, word_tokenizer, records, 0.5)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert abs(float(loss) - math.log(2)) > 1e-3
        for name, one in model.reft.bank("default").named_parameters():
            torch.testing.assert_close(got[name], one.grad, rtol=1e-3, atol=1e-5)

    def test_it_starts_at_ln_2_where_the_edit_is_nothing(self, word_llama, dpo):
        trainer = dpo(wrapped(word_llama, init="identity"))
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, batch)
        assert float(loss) == pytest.approx(math.log(2), abs=1e-6)

    def test_it_learns_and_there_is_one_model(self, word_llama, dpo):
        base = copy.deepcopy(word_llama.state_dict())
        model = wrapped(word_llama, init="identity")
        trainer = dpo(model, max_steps=10)
        assert list(trainer.ref_model.parameters()) == []
        trainer.train()
        found = losses(trainer)
        assert found[0] == pytest.approx(math.log(2), abs=1e-4)
        assert found[-1] < 0.5
        state = model.unload().state_dict()
        assert all(torch.equal(state[name], value) for name, value in base.items())

    @pytest.mark.parametrize("component", ["block_output", "mlp_output"])
    def test_with_checkpointing(self, word_llama, dpo, component):
        """TRL switches checkpointing off and on around every reference forward."""
        results = []
        for on in (False, True):
            model = wrapped(copy.deepcopy(word_llama), component=component)
            trainer = dpo(model, max_steps=3, gradient_checkpointing=on)
            trainer.train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    def test_reference_values_computed_before(self, word_llama, dpo):
        results = []
        for before in (False, True):
            model = wrapped(copy.deepcopy(word_llama))
            dpo(model, max_steps=2, precompute_ref_log_probs=before).train()
            results.append(parameters(model.reft))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)

    def test_a_reference_is_told_by_its_base(self, word_llama):
        from trl.trainer.utils import hash_module

        from reft.train.trl import Reference

        model = wrapped(word_llama)
        first = hash_module(Reference(model))
        with torch.no_grad():
            model.reft.bank("default").bias.add_(1)
        assert hash_module(Reference(model)) == first
        with torch.no_grad():
            word_llama.lm_head.weight.add_(1)
        assert hash_module(Reference(model)) != first

    def test_what_is_refused(self, word_llama, dpo, tmp_path):
        model = wrapped(word_llama)
        with pytest.raises(TypeError, match="ref_model must be None"):
            ReftDPOTrainer(model, ref_model=model)
        with pytest.raises(TypeError, match="ReftDPOTrainer trains a ReftModel"):
            dpo(model.unload())

    def test_layers_of_peft_are_refused(self, word_llama, dpo):
        peft = pytest.importorskip("peft")
        base = peft.get_peft_model(word_llama, peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="no layers of PEFT"):
            dpo(wrapped(base))


def test_importing_the_package_does_not_import_trl():
    import subprocess
    import sys

    code = "import sys, reft, reft.train.trainer; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert Path(__file__).name == "test_trl.py"
