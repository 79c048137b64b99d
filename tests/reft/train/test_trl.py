"""TRL's SFTTrainer with a ReftModel; TRL's own trainers refuse one."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl
from datasets import Dataset
from trl import SFTConfig
from trl_runs import SETTINGS, losses, parameters, wrapped

import reft
from reft import ReftSFTTrainer

TRL_MODULES = {f"reft.train.{name}" for name in ("trl", "trl_grpo", "sft_datasets")}


@pytest.fixture
def sft(word_tokenizer, spaced_records, tmp_path):
    def build(model, folder="run", **settings):
        return ReftSFTTrainer(
            model,
            args=SFTConfig(str(tmp_path / folder), **{**SETTINGS, **settings}),
            train_dataset=Dataset.from_list(spaced_records),
            eval_dataset=Dataset.from_list(spaced_records[:4]),
            processing_class=word_tokenizer,
        )

    return build


class TestSFT:
    def test_the_loss_goes_down_and_the_base_stays(self, word_llama, sft):
        base = copy.deepcopy(word_llama.state_dict())
        model = wrapped(word_llama)
        trainer = sft(model, max_steps=8)
        trainer.train()
        logged = losses(trainer)
        assert logged[-1] < logged[0] / 2
        assert trainer.evaluate()["eval_loss"] < logged[0]
        state = model.unload().state_dict()
        assert all(torch.equal(state[name], value) for name, value in base.items())

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_a_step_is_the_gradient_of_the_plain_loss(
        self, word_llama, word_tokenizer, spaced_records, sft, padding_free
    ):
        """Against the loss of the model on the same records, with explicit prompt lengths."""
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
        for record in spaced_records:
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
        for name, parameter in model.reft.adapter("default").named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)

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
        expected, got = (parameters(trainer._reft_model().reft) for trainer in (whole, again))
        assert all(torch.equal(got[name], value) for name, value in expected.items())

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


class TestTrainersOfTrl:
    @pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
    def test_trainers_name_the_one_to_use(
        self, word_llama, word_tokenizer, color_records, tmp_path, name
    ):
        word_llama.save_pretrained(tmp_path / "base")
        word_llama.config._name_or_path = str(tmp_path / "base")
        model = wrapped(word_llama)
        rows = [
            {**record, "chosen": record["completion"], "rejected": "no", "label": True}
            for record in color_records
        ]
        columns = {
            "SFT": ("prompt", "completion"),
            "DPO": ("prompt", "chosen", "rejected"),
            "KTO": ("prompt", "completion", "label"),
        }.get(name, ("prompt",))
        more = {"reward_funcs": lambda completions, **kwargs: [0.0] * len(completions)}
        forward = model.forward
        with pytest.raises(TypeError, match=r"ReftModel.*: use reft\.ReftSFTTrainer"):
            getattr(trl, f"{name}Trainer")(
                model,
                args=getattr(trl, f"{name}Config")(
                    str(tmp_path), report_to="none", use_cpu=True, bf16=False
                ),
                train_dataset=Dataset.from_list(
                    [{key: row[key] for key in columns} for row in rows]
                ),
                processing_class=word_tokenizer,
                **(more if name in ("GRPO", "RLOO") else {}),
            )
        assert model.forward is forward

    @pytest.mark.parametrize("tags", [["trl", "online-dpo"], ("gkd", "trl")])
    def test_trainers_that_add_their_tags(self, word_llama, tags):
        with pytest.raises(TypeError, match="does not take a ReftModel"):
            wrapped(word_llama).add_model_tags(tags)

    @pytest.mark.parametrize("tags", ["tag", ["a", "b"], ["trl", "reward-trainer"]])
    def test_other_tags_are_added_to_the_base(self, word_llama, tags):
        model = wrapped(word_llama)
        model.add_model_tags(tags)
        assert set(word_llama.model_tags) == ({tags} if isinstance(tags, str) else set(tags))

    def test_another_forward_may_be_assigned(self, word_llama):
        model = wrapped(word_llama)
        before = parameters(model)
        model.forward = lambda *args, **kwargs: 7
        assert model(1) == 7
        assert parameters(model).keys() == before.keys()


def test_only_modules_for_trl_import_trl():
    """Neither reft nor reft.train.trainer imports TRL."""
    root, importing = Path(reft.__file__).parent, set()
    for file in root.rglob("*.py"):
        if "trl" not in (text := file.read_text(encoding="utf-8")):
            continue
        nodes = ast.parse(text).body
        nodes += [child for node in nodes if isinstance(node, ast.Try) for child in node.body]
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        imports = (node for node in nodes if isinstance(node, ast.Import))
        names |= {alias.name for node in imports for alias in node.names}
        if any(name.split(".")[0] == "trl" or name in TRL_MODULES for name in names):
            importing.add(".".join(("reft", *file.relative_to(root).with_suffix("").parts)))
    assert importing == TRL_MODULES
