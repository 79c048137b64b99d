"""Table of user mistakes: what is called, and a pattern of the error message."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import build
from safetensors.torch import save_file
from tiny_models import bert, tokens
from torch import nn

import reft
from reft import ReftConfig, ReftDataCollator, ReftModel, ReftTrainer, get_reft_model

IDS = tokens(2, 6)


@dataclass
class Env:
    """The models and files of a mistake: a wrapped model of two adapters, a base, a folder."""

    model: ReftModel
    base: nn.Module
    folder: Path
    tokenizer: object

    def altered(self, name: str, **changes) -> Path:
        """A copy of the stored adapter with other configuration fields."""
        stored = json.loads((self.folder / "good/adapter_config.json").read_text())
        (self.folder / name).mkdir()
        (self.folder / name / "adapter_config.json").write_text(json.dumps({**stored, **changes}))
        tensors = {"rotation": torch.eye(24)[:3].expand(3, 1, 3, 24).contiguous()}
        tensors |= {"weight": torch.zeros(3, 1, 3, 24), "bias": torch.zeros(3, 1, 3)}
        save_file(tensors, self.folder / name / "adapter_model.safetensors")
        return self.folder / name

    def with_tensors(self, name: str, **tensors) -> Path:
        path = self.altered(name)
        good = {"rotation": torch.eye(24)[:3].expand(3, 1, 3, 24).contiguous()}
        good |= {"weight": torch.zeros(3, 1, 3, 24), "bias": torch.zeros(3, 1, 3)}
        stored = {key: value for key, value in {**good, **tensors}.items() if value is not None}
        save_file(stored, path / "adapter_model.safetensors")
        return path

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})


def wrap(**changes):
    return lambda env: get_reft_model(env.base, config(**changes))


def load(path):
    return lambda env: env.model.load_adapter(
        path(env) if callable(path) else env.folder / path, "new"
    )


def fresh(path):
    return lambda env: ReftModel.from_pretrained(env.base, env.folder / path)


def call(**given):
    return lambda env: env.model(IDS, **given)


def generate(**given):
    return lambda env: env.model.generate(IDS, max_new_tokens=2, **given)


def collate(*features, **settings):
    return lambda env: ReftDataCollator(env.tokenizer, **settings)(list(features))


def bad(dtype=torch.float32):
    return torch.zeros(3, 1, 3, 24, dtype=dtype)


#: mistake -> (call, pattern of the error message)
TABLE = {
    # ------------------------------------------------------------ configuration
    "intervention": (wrap(intervention="lorft"), "intervention must be .* got 'lorft'.*'loreft'"),
    "rank 0": (wrap(rank=0), "rank must be an integer of at least 1, got 0"),
    "rank of text": (wrap(rank="8"), "rank must be .* got '8'"),
    "rank above the width": (wrap(rank=25), "rank must be at most D = 24.*got 25"),
    "no layers": (wrap(layers=[]), r"layers must be .* got \[\]"),
    "layer twice": (wrap(layers=[1, -2]), "layers must name each layer once, got 1 and -2"),
    "layer outside": (wrap(layers=[3]), "layers must lie in 0 … 2 .* got 3"),
    "layer of text": (wrap(layers="1;x"), "layers must be .* got '1;x'"),
    "positions reversed": (wrap(positions="l1+f1"), r"positions must be .* got 'l1\+f1'"),
    "positions of a number": (wrap(positions="7"), "positions must be .* got '7'"),
    "positions zero": (wrap(positions="f0"), "positions must be .* got 'f0'"),
    "positions g0": (wrap(positions="prompt+g0"), r"positions must be .* got 'prompt\+g0'"),
    "positions of images": (wrap(positions="image"), 'positions must not be "image".*LlamaFor'),
    "tied": (wrap(tied="yes"), "tied must be True or False, got 'yes'"),
    "activation": (wrap(activation="rleu"), "activation must be .* got 'rleu'.*'relu'"),
    "dropout": (wrap(dropout=1.0), r"dropout must be a number of at least 0 and below 1, got 1.0"),
    "dropout_on": (wrap(dropout_on="h"), "dropout_on must be .* got 'h'"),
    "component": (wrap(component="mlp"), "component must be .* got 'mlp'"),
    "component of nothing": (
        wrap(component="module:mlp.x"),
        "'module:mlp.x' is no part of block 0",
    ),
    "init": (wrap(init="zero"), "init must be .* got 'zero'"),
    "identity of consreft": (
        wrap(init="identity", intervention="consreft"),
        'init must be "pyreft".*consreft',
    ),
    "dtype": (wrap(dtype="int8"), "dtype must be .* got 'int8'"),
    "short_prompts": (wrap(short_prompts="all"), "short_prompts must be .* got 'all'"),
    "prompt_end": (wrap(prompt_end="end"), "prompt_end must be .* got 'end'"),
    "modules_to_save": (wrap(modules_to_save=["clasifier"]), "modules_to_save must name modules"),
    "task_type": (wrap(task_type="CAUSAL"), "task_type must be .* got 'CAUSAL'"),
    "block_path": (wrap(block_path="model.layer"), r"block_path must name .* model\.layers \(3\)"),
    "newer format": (wrap(format_version=99), "format_version must be .* got 99"),
    "unknown field": (lambda env: ReftConfig.from_dict({"rnak": 1}), "no field 'rnak'.*'rank'"),
    "not a mapping": (lambda env: ReftConfig.from_dict([1]), "a mapping of fields, got list"),
    "not JSON": (lambda env: ReftConfig.from_json("{"), "not a ReftConfig in JSON"),
    # ------------------------------------------------------------ wrapping
    "no module": (lambda env: get_reft_model("llama", config()), "base_model must be a .* got str"),
    "no config": (
        lambda env: get_reft_model(nn.Linear(2, 2), config()),
        "must be a transformers model",
    ),
    "wrapped twice": (
        lambda env: get_reft_model(env.model, config()),
        "must not have adapters .* yet",
    ),
    "its base wrapped again": (
        lambda env: get_reft_model(env.model.base_model, config()),
        "must not have adapters",
    ),
    "both sides": (
        lambda env: get_reft_model(build("t5-encoder"), config()),
        "which side of the encoder",
    ),
    "name taken": (lambda env: env.model.add_adapter("other", config()), "'other', which is taken"),
    "name reserved": (
        lambda env: env.model.add_adapter("__base__", config()),
        "'__base__', which is reserved",
    ),
    "name of a method": (
        lambda env: env.model.add_adapter("forward", config()),
        "'forward', which is reserved",
    ),
    "name with a dot": (lambda env: env.model.add_adapter("a.b", config()), "without dots.*'a.b'"),
    "name with a slash": (lambda env: env.model.add_adapter("../a", config()), "without .* '../a'"),
    "empty name": (
        lambda env: env.model.add_adapter("", config()),
        "adapter_name must be .* got ''",
    ),
    "second adapter too wide": (
        lambda env: env.model.add_adapter("new", config(rank=99)),
        "rank must be at most D = 24",
    ),
    "second adapter elsewhere": (
        lambda env: env.model.add_adapter("new", config(block_path="model")),
        "block_path must be 'model.layers', where this model's adapters are",
    ),
    "set unknown": (
        lambda env: env.model.set_adapter("none"),
        r"one of the adapters \('default', 'other'\)",
    ),
    "delete unknown": (lambda env: env.model.delete_adapter("none"), "one of the adapters"),
    "merge": (lambda env: env.model.merge_and_unload(), "cannot be merged"),
    # ------------------------------------------------------------ calls
    "no input": (lambda env: env.model(), "must get input_ids or inputs_embeds"),
    "a mask of four dimensions": (
        call(attention_mask=torch.ones(2, 1, 6, 6)),
        r"attention_mask must be \(batch, columns\)",
    ),
    "prompt too long": (call(prompt_lengths=[6, 7]), "sequence 1 has 6, got 7"),
    "prompt negative": (call(prompt_lengths=[-1, 2]), "sequence 0 has 6, got -1"),
    "one length for two": (call(prompt_lengths=[3]), r"one entry per sequence, shape \(2,\)"),
    "fractional lengths": (call(prompt_lengths=[1.5, 2.0]), "must be integers, got torch.float32"),
    "names in a string": (call(adapter_names="other"), "a list of one name per sequence"),
    "too few names": (call(adapter_names=["other"]), r"one name per sequence \(2 of them\)"),
    "a name that is not there": (call(adapter_names=["other", "x"]), "one of the adapters .* 'x'"),
    "given out of range": (call(edit_positions=[[0], [9]]), "sequence 1 has 6 tokens.*got 9"),
    "given as text": (call(edit_positions="f1"), "edit_positions must be a list of token numbers"),
    "labels of another shape": (
        call(labels=torch.zeros(2, 4, dtype=torch.long)),
        r"labels must have the shape.*\(2, 4\)",
    ),
    "continuous batching": (call(write_index=torch.zeros(1)), "continuous batching"),
    "generate a name": (generate(adapter_names=["other", "x"]), "one of the adapters .* 'x'"),
    "generate a length": (generate(prompt_lengths=[9, 1]), "sequence 0 has 6, got 9"),
    "generate a place": (generate(edit_positions=[[1]]), r"one list a sequence \(2 of them\)"),
    "a classifier generates": (
        lambda env: get_reft_model(bert(), config()).generate(IDS),
        "cannot generate",
    ),
    # ------------------------------------------------------------ disk
    "save an unknown adapter": (
        lambda env: env.model.save_pretrained(env.folder / "x", adapter_name="x"),
        "one of the",
    ),
    "save into a file": (
        lambda env: env.model.save_pretrained(env.folder / "good/adapter_config.json"),
        "stored in a directory, but this is a file",
    ),
    "load from nowhere": (load("nowhere"), "nowhere"),
    "load from a file": (load("good/adapter_config.json"), "a file"),
    "load from an empty folder": (
        load(lambda env: env.file("empty/x", b"").parent),
        "not an adapter directory",
    ),
    "load under a taken name": (
        lambda env: env.model.load_adapter(env.folder / "good", "other"),
        "'other', which is taken",
    ),
    "a truncated file": (
        load(lambda env: env.file("good/adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{").parent),
        "truncated or not a safetensors file",
    ),
    "a config that is no JSON": (
        load(lambda env: env.file("good/adapter_config.json", b"{").parent),
        "ReftConfig in JSON",
    ),
    "an unknown stored field": (load(lambda env: env.altered("a", rnk=3)), "no field 'rnk'"),
    "a newer stored format": (
        load(lambda env: env.altered("a", format_version=99)),
        "must be 2, got 99; a newer version of reft wrote it",
    ),
    "layers that are not there": (
        load(lambda env: env.altered("a", layers=[0, 1, 7])),
        "layers must lie in 0 … 2 .* got 7",
    ),
    "another rank": (load(lambda env: env.altered("a", rank=4)), "must have shape .*4"),
    "another intervention": (
        load(lambda env: env.altered("a", intervention="consreft")),
        "unknown: weight",
    ),
    "another width": (
        load(lambda env: env.with_tensors("a", weight=torch.zeros(3, 1, 3, 16))),
        "must have shape",
    ),
    "a tensor missing": (load(lambda env: env.with_tensors("a", bias=None)), "missing: bias"),
    "a tensor too many": (load(lambda env: env.with_tensors("a", extra=bad())), "unknown: extra"),
    "R that is not orthonormal": (
        load(lambda env: env.with_tensors("a", rotation=bad())),
        "orthonormal rows",
    ),
    "R of NaN": (
        load(lambda env: env.with_tensors("a", rotation=bad() + torch.nan)),
        "rotation must be finite",
    ),
    "a fresh model from nowhere": (fresh("nowhere"), "nowhere"),
    "restore without its state": (
        lambda env: env.model.restore(env.folder / "good"),
        "rotation.base, rotation.free",
    ),
    "restore another configuration": (
        lambda env: env.model.restore(env.folder / "good", "other"),
        "of the same configuration",
    ),
    "pyreft from nowhere": (
        lambda env: reft.load_pyreft(env.folder / "no", env.base, positions="f1"),
        "no",
    ),
    "pyreft from ours": (
        lambda env: reft.load_pyreft(env.folder / "good", env.base, positions="f1"),
        "good",
    ),
    "adapters from ours": (
        lambda env: reft.load_adapters_reft(env.folder / "good", env.base),
        "good",
    ),
    # ------------------------------------------------------------ data and training
    "empty batch": (collate(), "at least one feature, got none"),
    "a record of another form": (collate({"question": "a"}), r"got \['question'\]"),
    "fields that differ": (
        collate({"input_ids": [3]}, {"input_ids": [3], "x": 1}),
        "the same fields",
    ),
    "no room": (
        collate({"prompt": "a b c", "completion": "yes"}, max_length=4),
        "no room for the completion",
    ),
    "an empty prompt": (
        collate({"input_ids": [], "prompt": ""}, max_length=0),
        "max_length must be",
    ),
    "too long": (
        collate({"prompt": "a", "completion": "b " * 9}, max_length=5),
        "2 \\+ 10 tokens and max_length",
    ),
    "a place outside": (
        collate({"prompt": "a", "completion": "b", "edit_positions": [9]}),
        "got 9",
    ),
    "padding twice": (
        collate({"input_ids": [3]}, padding_free=True, pad_to_multiple_of=8),
        "None with",
    ),
    "trainer of a base": (
        lambda env: ReftTrainer(env.base),
        "ReftTrainer trains a ReftModel.*got LlamaForCausalLM",
    ),
}
