"""Initialisation of a new adapter from the seed of the Trainer's arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import bert, llama
from transformers import TrainingArguments

from reft import ReftConfig, ReftModel, ReftTrainer, get_reft_model
from reft.train.seeded_init import initialise_from_seed

CONFIG = ReftConfig(rank=2, positions="f2+l2")


def arguments(folder, **changes) -> TrainingArguments:
    settings = {"report_to": "none", "use_cpu": True, "max_steps": 2, "save_strategy": "no"}
    return TrainingArguments(str(folder), disable_tqdm=True, **{**settings, **changes})


def published(model: ReftModel, name: str = "default") -> dict[str, torch.Tensor]:
    return model._registry.adapter(name).export_state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def drawn(seed: int, config: ReftConfig = CONFIG, base=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return published(get_reft_model(base or llama(), config, generator=generator))


def unseeded(config: ReftConfig = CONFIG, base=None) -> ReftModel:
    """A model whose adapter is initialised from a random seed."""
    base = base or llama()
    torch.seed()
    return get_reft_model(base, config)


MEMBERS = [
    CONFIG,
    ReftConfig(intervention="direft", rank=2),
    ReftConfig(intervention="noreft", rank=2),
    ReftConfig(intervention="consreft", rank=2),
    ReftConfig(intervention="lobireft", rank=2),
    ReftConfig(rank=2, init="identity"),
    ReftConfig(rank=2, tied=False, layers=[0, 2]),
    ReftConfig(rank=2, dtype="bfloat16"),
    ReftConfig(rank=2, modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize(
    "config", MEMBERS, ids=lambda config: f"{config.intervention}-{config.init}"
)
def test_the_seed_determines_the_initialisation(config, tmp_path):
    model = unseeded(config)
    expected = drawn(7, config)
    assert not same(published(model), expected)
    ReftTrainer(model, arguments(tmp_path, seed=7))
    assert same(published(model), expected)
    assert not same(drawn(42, config), expected)


def test_two_runs_of_one_seed_are_equal(tmp_path):
    rows = [
        {"input_ids": [1, 5, 6, 7, 8], "labels": [-100, -100, -100, 7, 8 + n]} for n in range(8)
    ]

    def joined(batch):
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    def run(seed):
        model = unseeded(ReftConfig(rank=2, positions="f2+l2", dropout=0.3))
        args = arguments(tmp_path, seed=seed, per_device_train_batch_size=2, learning_rate=0.1)
        ReftTrainer(model, args, joined, rows).train()
        return published(model)

    assert same(run(3), run(3))
    assert not same(run(3), run(4))


def test_global_random_numbers_are_not_drawn():
    model = unseeded()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initialise_from_seed(model, 5)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_made_for_each_run(tmp_path):
    base = []

    def make():
        if base:
            base[0].unload()
        torch.seed()
        base[:] = [get_reft_model(llama() if not base else base[0].base_model, CONFIG)]
        return base[0]

    trainer = ReftTrainer(args=arguments(tmp_path, seed=9), model_init=make)
    assert same(published(trainer.model), drawn(9))


def test_a_moved_or_copied_adapter_is_still_initialised(tmp_path):
    for change in (copy.deepcopy, lambda m: m.to("cpu"), lambda m: m.eval()):
        model = change(unseeded())
        initialise_from_seed(model, 5)
        assert same(published(model), drawn(5))


# ------------------------------------------------------------------ adapters that are not changed


def generated(model):
    return get_reft_model(model.unload(), CONFIG, generator=torch.Generator().manual_seed(1))


def assigned(model):
    adapter = model._registry.adapter("default")
    adapter.assign(bias=adapter.bias + 1)
    return model


def assigned_the_same(model):
    adapter = model._registry.adapter("default")
    adapter.assign(bias=adapter.bias.detach().clone())
    return model


def trained(model):
    model._registry.adapter("default").bias.data += 1  # bypasses the version counter
    return model


def loaded_state(model):
    model.load_state_dict(model.state_dict())
    return model


def drawn_before(model):
    initialise_from_seed(model, 1)
    return model


@pytest.mark.parametrize(
    "change", [generated, assigned, assigned_the_same, trained, loaded_state, drawn_before]
)
def test_values_that_the_user_has_set_stay(change, tmp_path):
    model = change(unseeded())
    before = published(model)
    ReftTrainer(model, arguments(tmp_path, seed=7))
    assert same(published(model), before)


def test_a_loaded_adapter_stays(tmp_path):
    unseeded().save_pretrained(tmp_path / "adapter")
    model = ReftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    before = published(model)
    ReftTrainer(model, arguments(tmp_path, seed=7))
    assert same(published(model), before)


def test_an_adapter_trained_in_a_loop_stays(tmp_path):
    model = unseeded()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=torch.tensor([[-100, -100, 6, 7]])).loss.backward()
    optimizer.step()
    before = published(model)
    ReftTrainer(model, arguments(tmp_path, seed=7))
    assert same(published(model), before)


def test_modules_to_save_and_the_base_stay(tmp_path):
    model = unseeded(ReftConfig(rank=2, task_type="SEQ_CLS", positions="prompt"), bert())
    before = {n: p.clone() for n, p in model.named_parameters() if ".adapters." not in n}
    ReftTrainer(model, arguments(tmp_path, seed=7))
    after = dict(model.named_parameters())
    assert any("classifier" in name for name in before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_only_the_active_adapter_is_initialised(tmp_path):
    model = unseeded()
    model.add_adapter("other", ReftConfig(rank=3))
    before = published(model, "other")
    ReftTrainer(model, arguments(tmp_path, seed=7))
    assert same(published(model, "other"), before)
    assert same(published(model), drawn(7))
