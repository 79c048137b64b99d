"""Training LoRA of PEFT and an adapter of this library together: checkpoints hold both."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lora_models import IDS, config, logits_of, trained, with_lora
from transformers import TrainerCallback

from reft import ReftModel, get_reft_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("order", ["task", "transformers"])
def test_a_resumed_run_of_both_is_the_uninterrupted_one(order, make_trainer, word_llama, tmp_path):
    word_llama.requires_grad_(False)
    start = {name: value.clone() for name, value in word_llama.state_dict().items()}

    def fresh(folder, **arguments):
        base = with_lora(order, model=copy.deepcopy(word_llama), init_lora_weights=True)
        torch.manual_seed(1)
        model = get_reft_model(base, config(dropout=0.1))
        return make_trainer(folder, model=model, max_steps=6, weight_decay=0.01, **arguments)

    whole = fresh("whole")
    first = {name: parameter.detach().clone() for name, parameter in trained(whole.model).items()}
    whole.train()
    expected = {
        name: parameter.detach().clone() for name, parameter in trained(whole.model).items()
    }
    assert not any(torch.equal(first[name], expected[name]) for name in expected)

    stopped = fresh("split", save_strategy="steps", save_steps=3)
    stopped.add_callback(Stop())
    stopped.train()
    checkpoint = tmp_path / "split" / "checkpoint-3"
    resumed = fresh("split")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in trained(resumed.model).items():
        assert torch.equal(value, expected[name]), name

    # PEFT itself can load the stored LoRA.
    base = peft.PeftModel.from_pretrained(word_llama, checkpoint / "lora")
    model = ReftModel.from_pretrained(base, checkpoint)
    ids = IDS % word_llama.config.vocab_size
    torch.testing.assert_close(
        logits_of(model, ids), logits_of(stopped.model.eval(), ids), rtol=1e-5, atol=1e-6
    )
    plain = model.unload().unload()
    assert all(torch.equal(value, start[name]) for name, value in plain.state_dict().items())


def test_the_best_of_both_comes_back_at_the_end(make_trainer, word_llama, color_records):
    base = with_lora("task", model=word_llama, init_lora_weights=True)
    trainer = make_trainer(
        model=get_reft_model(base, config(), generator=torch.Generator().manual_seed(1)),
        max_steps=4,
        eval_data=color_records,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,  # so large that the best step is not the last
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    best = min(losses, key=losses.__getitem__)
    assert best != 4
    assert trainer.evaluate()["eval_loss"] == losses[best]


def test_lora_of_another_shape_is_refused(make_trainer, word_llama, tmp_path):
    from reft.model.lora import save_lora
    from reft.train.lora_checkpoints import read_lora, set_lora

    model = get_reft_model(with_lora("task"), config())
    save_lora(model.base_model, tmp_path)
    other = get_reft_model(with_lora("task", r=3), config())
    before = {name: parameter.detach().clone() for name, parameter in trained(other).items()}
    with pytest.raises(ValueError, match=r"must hold the tensors of PEFT's adapter 'default'"):
        set_lora(other, read_lora(other, tmp_path))
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(other).items())
    with pytest.raises(FileNotFoundError, match=r"PEFT's adapter 'default'"):
        read_lora(other, tmp_path / "nowhere")


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("order", ["task", "transformers"])
def test_several_adapters_of_peft_are_all_stored(order, gathered, tmp_path):
    from reft.model.lora import save_lora
    from reft.train.lora_checkpoints import read_lora, set_lora

    def two(seed):
        base = with_lora(order, seed=seed)
        again = peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if order == "transformers":
                base.add_adapter(again, "second")
            else:
                base.add_adapter("second", again)
        return get_reft_model(base, config())

    model, other = two(1), two(2)
    stored = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if gathered:  # under ZeRO-3 the model's own parameters are empty
        for parameter in model.parameters():
            parameter.data.zero_()
    save_lora(model.base_model, tmp_path, state if gathered else None)
    set_lora(other, read_lora(other, tmp_path))
    assert len(stored) == 2 * 3 * 3
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, stored[name]), name
