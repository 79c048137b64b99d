"""ReftTrainer.hyperparameter_search: one model per trial, with optuna's interface replaced."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.integrations.integration_utils import run_hp_search_optuna
from transformers.trainer_utils import HPSearchBackend

from reft import ReftConfig, ReftDataCollator, ReftModel, ReftTrainer, get_reft_model


class Trial:
    """A trial of a search: the values of its number."""

    def __init__(self, number: int, values: dict[str, list]) -> None:
        self.number = number
        self.params = {name: choices[number] for name, choices in values.items()}

    def report(self, *args) -> None:
        pass

    def should_prune(self) -> bool:
        return False


@pytest.fixture
def search(monkeypatch):
    """A function that runs a search over given values, with the part of optuna that it needs."""

    def start(trainer, values, **options):
        trials = []

        def optimize(objective, n_trials, **kwargs):
            for number in range(n_trials):
                trials.append(SimpleNamespace(number=number, params=None, value=None))
                trial = Trial(number, values)
                trials[-1].params, trials[-1].value = trial.params, objective(trial)

        class Study:
            best_trial = property(lambda self: min(trials, key=lambda trial: trial.value))

            def optimize(self, *args, **options):
                optimize(*args, **options)

            def _is_multi_objective(self):
                return False

        module = ModuleType("optuna")
        module.trial = SimpleNamespace(BaseTrial=Trial)
        module.__spec__ = ModuleSpec("optuna", None)
        module.Trial, module.create_study = Trial, lambda **kwargs: Study()
        monkeypatch.setitem(sys.modules, "optuna", module)

        class Backend:
            def ensure_available(self):
                pass

            def run(self, trainer, n_trials, direction, **kwargs):
                return run_hp_search_optuna(trainer, n_trials, direction, **kwargs)

        monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: trial.params, backend="optuna", direction="minimize",
            n_trials=len(next(iter(values.values()))), **options,
        )  # fmt: skip
        return best, trials

    return start


@pytest.fixture
def searched(word_llama, word_tokenizer, color_records, tmp_path):
    def build(config=None, **changes):
        made = []

        def make(trial=None):
            if made:
                made[-1].unload()
            made.append(get_reft_model(word_llama, config or ReftConfig(rank=2, positions="f2+l2")))
            return made[-1]

        settings = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
        arguments = TrainingArguments(
            str(tmp_path), disable_tqdm=True, **{**settings, "learning_rate": 1e-2, **changes}
        )
        trainer = ReftTrainer(
            None, arguments, ReftDataCollator(word_tokenizer), color_records, color_records,
            model_init=make,
        )  # fmt: skip
        return trainer, made

    return build


def test_each_trial_trains_a_new_model(searched, search):
    """A trial equals the run with its settings."""
    trainer, made = searched(seed=1)
    rates = [3e-2, 1e-4]
    best, trials = search(trainer, {"learning_rate": rates})
    assert len(made) == 1 + len(rates)  # one for the Trainer itself
    losses = [trial.value for trial in trials]
    assert losses[0] != losses[1]
    assert best.objective == min(losses)
    assert best.hyperparameters == trials[losses.index(min(losses))].params
    made[-1].unload()
    for rate, loss in zip(rates, losses, strict=True):
        alone, models = searched(learning_rate=rate, seed=1)
        alone.train()
        assert alone.evaluate()["eval_loss"] == loss
        models[-1].unload()


def test_the_seed_of_a_trial_initialises_its_adapter(searched, search, monkeypatch):
    trainer, made = searched()
    began = []
    monkeypatch.setattr(
        "reft.train.fsdp2.broadcast_adapters",
        lambda model: began.append(model._registry.adapter("default").export_state_dict()),
    )
    search(trainer, {"seed": [5, 6]})
    base = made[-1].unload()
    for seed, initial in zip((5, 6), began, strict=True):
        generator = torch.Generator().manual_seed(seed)
        model = get_reft_model(base, ReftConfig(rank=2, positions="f2+l2"), generator=generator)
        expected = model._registry.adapter("default").export_state_dict()
        assert all(torch.equal(value, initial[name]) for name, value in expected.items())
        model.unload()


def test_checkpoints_of_trials_hold_their_adapters(searched, search, tmp_path):
    trainer, made = searched(save_strategy="steps", save_steps=1, eval_strategy="no")
    search(trainer, {"learning_rate": [1e-2, 3e-2]})
    base = made[-1].unload()
    unloaded = [
        ReftModel.from_pretrained(base, tmp_path / f"run-{number}" / "checkpoint-1").unload()
        for number in range(2)
    ]
    assert unloaded == [base, base]


def test_what_is_made_must_be_a_reft_model(searched, search, word_llama):
    trainer, made = searched()
    made[-1].unload()
    trainer.model_init = lambda: word_llama
    with pytest.raises(TypeError, match=r"reft\.get_reft_model.*got LlamaForCausalLM"):
        search(trainer, {"learning_rate": [1e-2]})


def test_trials_without_a_backend(searched):
    """Other backends clear the accelerator between two trials."""
    trainer, _ = searched()
    for _ in range(2):
        trainer.train()
        assert trainer.steps_trained == 1
        trainer.model_wrapped = trainer.model = None
        trainer.accelerator.clear()
