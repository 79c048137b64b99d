"""Names and calls of PEFT, pyreft and adapters raise errors that name this library's equivalent."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields, replace

import peft
import pytest
import torch
from test_mistakes import same, state_of
from tiny_models import llama, tokens
from transformers import TrainingArguments

from reft import ReftConfig, ReftDataCollator, ReftModel, ReftTrainer, get_reft_model
from reft.foreign_names import FOREIGN, WRAPPING

IDS = tokens(2, 6)
FIELDS = [field.name for field in fields(ReftConfig)]


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 2, "positions": "l1", **changes})


class TestFields:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"r": 8}, "no field 'r': write rank;"),
            ({"lora_alpha": 16}, "'lora_alpha': leave it out: an edit is not scaled"),
            ({"target_modules": ["q_proj"]}, "'target_modules': write layers and component"),
            ({"lora_dropout": 0.1}, "'lora_dropout': write dropout"),
            ({"low_rank_dimension": 4}, "'low_rank_dimension': write rank"),
            (
                {"representations": [{"layer": 8}]},
                r"'representations': .*ReftConfig\(layers=\[15\]",
            ),
            ({"intervention_types": []}, "'intervention_types': write intervention="),
            ({"inference_mode": True}, r"'inference_mode': .*set_adapter\(name, inference_mode"),
            ({"prefix_positions": 3}, r"'prefix_positions': write positions=\"f7\+l7\""),
            ({"rnak": 3}, r"no field 'rnak' \(did you mean 'rank'\?\)"),
            ({"Rank": 3}, r"no field 'Rank' \(did you mean 'rank'\?\)"),
            ({"r": 8, "lora_alpha": 16, "rank": 3}, "'r': write rank; no 'lora_alpha': leave"),
        ],
        ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
    )
    def test_a_name_of_another_library(self, values, words):
        with pytest.raises(TypeError, match=words) as by_keyword:
            ReftConfig(**values)
        with pytest.raises(ValueError, match=words) as by_mapping:
            ReftConfig.from_dict(values)
        with pytest.raises(TypeError, match=words):
            replace(config(), **values)
        assert str(by_keyword.value) == str(by_mapping.value)
        assert "\n" not in str(by_keyword.value)

    @pytest.mark.parametrize("name", FOREIGN)
    def test_every_explained_name_is_foreign_and_names_what_there_is(self, name):
        assert name not in FIELDS
        explanation = FOREIGN[name]
        assert "leave it out" in explanation or any(
            field in explanation for field in [*FIELDS, "get_reft_model"]
        )

    def test_what_peft_calls_its_fields_is_explained(self):
        ours = {*FIELDS, "revision"}
        common = {"r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora"}
        theirs = {field.name for field in fields(peft.LoraConfig)}
        assert common <= theirs - ours
        assert common <= FOREIGN.keys()

    def test_many_unknown_names_are_cut(self):
        with pytest.raises(ValueError, match=r"no 44 others; its fields") as caught:
            ReftConfig.from_dict({f"qqqq{number}": 1 for number in range(50)})
        assert len(str(caught.value)) < 1000

    def test_the_class_is_still_a_plain_dataclass(self):
        assert list(inspect.signature(ReftConfig).parameters) == FIELDS
        plain = config()
        assert pickle.loads(pickle.dumps(plain)) == copy.deepcopy(plain) == plain
        with pytest.raises(TypeError, match="positional"):
            ReftConfig(*range(99))

    @pytest.mark.parametrize(
        ("task", "near"), [("SEQ_CLASS", "SEQ_CLS"), ("seq_cls", "SEQ_CLS"), ("CLM", None)]
    )
    def test_a_task_spelt_wrong(self, task, near):
        with pytest.raises(ValueError, match=r"task_type must be .*\"SEQ_CLS\"") as caught:
            config(task_type=task)
        assert (f"did you mean {near!r}" in str(caught.value)) is (near is not None)

    def test_pefts_own_task_type_is_text_here(self):
        made = config(task_type=peft.TaskType.SEQ_CLS)
        assert type(made.task_type) is str
        assert made == ReftConfig.from_json(made.to_json()) == config(task_type="SEQ_CLS")


class Pyreft:
    """A configuration with the name and module of pyreft's."""


Pyreft.__name__ = Pyreft.__qualname__ = "ReftConfig"
Pyreft.__module__ = "pyreft.config"
LORA = peft.LoraConfig(r=2, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("act", "words"),
    {
        "swapped": (lambda base: get_reft_model(config(), base), "the model comes first"),
        "swapped lora": (
            lambda base: get_reft_model(LORA, base),
            "got LoraConfig; the model comes",
        ),
        "a name": (lambda base: get_reft_model("gpt2", config()), "got str; load it first"),
        "a class": (
            lambda base: get_reft_model(type(base), config()),
            r"got the class LlamaForCausalLM; .*LlamaForCausalLM\.from_pretrained",
        ),
        "lora": (
            lambda base: get_reft_model(base, LORA),
            r"got peft\.\S*LoraConfig; .*peft\.get_peft_model",
        ),
        "pyreft": (
            lambda base: get_reft_model(base, Pyreft()),
            r"got pyreft\.config\.ReftConfig; .*reft\.ReftConfig\(layers",
        ),
        "no instance": (lambda base: get_reft_model(base, ReftConfig), r"make one: ReftConfig\("),
        "a mapping": (lambda base: get_reft_model(base, {"rank": 2}), "from_dict makes one"),
        "a folder": (lambda base: get_reft_model(base, "adapter"), "from_pretrained.* loads a sto"),
        "nothing": (lambda base: get_reft_model(base, None), "got NoneType"),
        "two models": (lambda base: get_reft_model(base, base), "the model comes first"),
        "two configurations": (
            lambda base: get_reft_model(base, config(), config(rank=3)),
            "adapter_name must be a string, got a ReftConfig",
        ),
        "the wrapper's class": (
            lambda base: ReftModel(base, config()),
            "block_path must be None or a string, got ReftConfig; get_reft_model",
        ),
        "a stored adapter first": (
            lambda base: ReftModel.from_pretrained("adapter", base),
            "base_model must be a torch.nn.Module, got str; load it first",
        ),
        "pefts keywords": (
            lambda base: get_reft_model(model=base, peft_config=config()),
            "no model: write base_model; no peft_config: write config",
        ),
        "pyrefts keywords": (
            lambda base: get_reft_model(base, config(), set_device=True),
            "no set_device: leave it out",
        ),
        "an unknown keyword": (
            lambda base: get_reft_model(base, config(), confg=1),
            "unexpected keyword argument 'confg'",
        ),
    }.values(),
)
def test_wrapping_in_another_order(act, words):
    base = llama()
    before = state_of(base)
    with pytest.raises(TypeError, match=words) as caught:
        act(base)
    assert "\n" not in str(caught.value)
    assert same(before, state_of(base))
    assert not hasattr(base, "reft")
    assert [*WRAPPING.keys() & inspect.signature(get_reft_model).parameters] == []


@pytest.mark.parametrize(
    ("act", "words"),
    {
        "swapped": (lambda m: m.add_adapter(config(), "new"), "the name comes first"),
        "lora": (lambda m: m.add_adapter("new", LORA), "what PEFT trains goes into the base first"),
        "lora first": (lambda m: m.add_adapter(LORA, "new"), "must be a reft.ReftConfig, got str"),
        "two names": (lambda m: m.set_adapter("a", "b"), "inference_mode must be True or False"),
    }.values(),
)
def test_adding_and_switching_in_another_order(act, words):
    model = get_reft_model(llama(), config(), "a")
    model.add_adapter("b", config())
    before = state_of(model.base_model)
    with pytest.raises(TypeError, match=words):
        act(model)
    assert same(before, state_of(model.base_model))


BOTH = ["early", "late"]
METHODS = {
    "set": lambda m, names, path: m.set_adapter(names),
    "delete": lambda m, names, path: m.delete_adapter(names),
    "add": lambda m, names, path: m.add_adapter(names, config()),
    "load": lambda m, names, path: m.load_adapter(path, names),
    "save": lambda m, names, path: m.save_pretrained(path / "new", adapter_name=names),
    "restore": lambda m, names, path: m.restore(path, names),
    "remove": lambda m, names, path: m.pool.remove(names),
    "forward": lambda m, names, path: m(IDS, adapter_names=[names, "late"]),
    "generate": lambda m, names, path: m.generate(
        IDS, adapter_names=["late", names], max_new_tokens=1
    ),
    "batch": lambda m, names, path: m.generate_batch([[3, 4], [5]], adapter_names=["late", names]),
}


#: Every method gets a list; one method of each kind gets all other wrong types.
WRONG_NAMES = [
    *((method, BOTH) for method in METHODS),
    *(
        (method, names)
        for method in ("set", "batch")
        for names in ((*BOTH,), {*BOTH}, [], 3, b"late")
    ),
]


@pytest.mark.parametrize(("method", "names"), WRONG_NAMES)
def test_one_adapter_is_named_at_a_time(method, names, tmp_path):
    model = get_reft_model(llama(), config(layers=[0]), "early").eval()
    model.add_adapter("late", config(layers=[2]))
    model.save_pretrained(tmp_path, training_state=True)
    before, files = state_of(model.base_model), sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^(?!.*unhashable).*(one |a new )name|pool's") as caught:
        METHODS[method](model, names, tmp_path)
    assert "\n" not in str(caught.value)
    assert same(before, state_of(model.base_model))
    assert (model.active_adapter, list(model.configs)) == ("early", BOTH)
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("name", [None, 3, ["late"], "__base__"], ids=str)
def test_what_stands_for_none_in_a_batch(name):
    model = get_reft_model(llama(), config(), "late").eval()
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(IDS).logits
        if name == "__base__":
            assert torch.equal(model(IDS, adapter_names=[name] * 2).logits, plain)
            return
        with pytest.raises(ValueError, match=r"for sequence 1; .*'__base__' stands for none"):
            model(IDS, adapter_names=["late", name])
        for all_of_them in (3, None if name is None else 7.5):
            if all_of_them is not None:
                with pytest.raises(ValueError, match="must be a list of one name per sequence"):
                    model(IDS, adapter_names=all_of_them)


def test_the_list_of_active_adapters_can_be_given_back():
    model = get_reft_model(llama(), config(), "a")
    model.add_adapter("b", config())
    active = model.active_adapters
    model.set_adapter("b")
    model.set_adapter(active)
    assert model.active_adapters == ["a"]
    model.delete_adapter(("b",))
    assert list(model.configs) == ["a"]


class TestAttributes:
    NAMES = ("peft_config", "active_peft_config", "peft_type", "disable_adapters")

    @pytest.mark.parametrize("name", NAMES)
    def test_without_layers_of_peft_there_are_none(self, name):
        model = get_reft_model(llama(), config())
        assert not hasattr(model, name)
        assert getattr(model, name, None) is None
        with pytest.raises(AttributeError, match=rf"no '{name}' while PEFT has no layers.*; \w+"):
            getattr(model, name)
        model.unload()
        assert not hasattr(model, name)

    def test_with_them_it_is_pefts(self):
        base = peft.get_peft_model(llama(), LORA)
        model = get_reft_model(base, config())
        assert hasattr(model, "peft_config")
        assert model.peft_config is base.peft_config
        assert model.peft_type == peft.PeftType.LORA

    def test_what_a_merge_leaves_behind_does_not_count(self):
        base = peft.get_peft_model(llama(), LORA).merge_and_unload()
        base.peft_config = {"default": LORA}
        assert not hasattr(get_reft_model(base, config()), "peft_config")

    def test_others_are_the_bases(self):
        model = get_reft_model(llama(), config())
        with pytest.raises(
            AttributeError, match="'LlamaForCausalLM' object has no attribute 'nope'"
        ):
            _ = model.nope


class TestTrainingHabits:
    RECORDS = ({"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"})

    @pytest.mark.parametrize(
        "records", [RECORDS, [{"text": "a"}], [{"messages": [{"role": "user", "content": "a"}]}]]
    )
    def test_text_without_a_collator(self, records, tmp_path):
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
        with pytest.raises(ValueError, match=r"data_collator must be given, reft.ReftDataColl"):
            ReftTrainer(get_reft_model(llama(), config()), arguments, train_dataset=list(records))
        tokens = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}]
        ReftTrainer(get_reft_model(llama(), config()), arguments, train_dataset=tokens)

    @pytest.mark.parametrize("wrong", [[{"prompt": "a"}], "out", {"lr": 1e-3}])
    def test_something_else_for_the_arguments(self, wrong):
        with pytest.raises(TypeError, match=r"args must be transformers.TrainingArguments, got"):
            ReftTrainer(get_reft_model(llama(), config()), wrong)

    @pytest.mark.parametrize("feature", ["a", [{"role": "user", "content": "a"}]])
    def test_a_feature_without_fields(self, feature, word_tokenizer):
        with pytest.raises(TypeError, match="a feature must be a mapping"):
            ReftDataCollator(word_tokenizer)([feature])
