"""Make the fixture folders of pyreft and adapters, with the logits of their models.

Run by hand; the output is committed under ``tests/fixtures``. The libraries cannot be installed
together, so there are three runs, each with Python 3.11, torch 2.13.0 (CPU) and safetensors::

    python3 -m venv /tmp/new && /tmp/new/bin/pip install torch==2.13.0 transformers==5.23.0 \
        accelerate datasets matplotlib safetensors
    /tmp/new/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    OMP_NUM_THREADS=1 /tmp/new/bin/python tests/reft/interop/make_fixtures.py pyreft

    the same with pyreft==0.0.8 pyvene==0.1.6, which name their files with dots:
    OMP_NUM_THREADS=1 /tmp/old/bin/python tests/reft/interop/make_fixtures.py pyreft-old

    the same with transformers==4.51.3 and pip install --no-deps adapters==1.2.0:
    OMP_NUM_THREADS=1 /tmp/ad/bin/python tests/reft/interop/make_fixtures.py adapters

The first run also writes ``base.safetensors``, the model of the others. Every folder is what the
library's own ``save`` (or ``ReftTrainer.save_model``) wrote, unchanged. ``<library>.safetensors``
holds the logits of that library's model for each folder, and how the model was made.

R is moved away from its initialisation before it is saved, because torch's parametrisation has a
special form there.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

FIXTURES = Path(__file__).parents[2] / "fixtures"
DIM, LAYERS, VOCABULARY, LABELS, RANK = 16, 3, 29, 3, 3
BASE = {
    "hidden_size": DIM,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    # The Llama of adapters 1.2.0 transposes the attention output once too often for the
    # transformers version that it requires, which mixes heads with tokens: only one head works.
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "num_labels": LABELS,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}

# Settings of pyreft; missing keys have the values of PLAIN. positions and tied are passed to every
# call, the other settings to the constructor.
PLAIN = {
    "intervention": "loreft",
    "positions": "f3+l2",
    "tied": True,
    "layers": [0, 1, 2],
    "activation": None,
    "component": "block_output",
    "dtype": "float32",
    "save": "save",
}
# Both sides have equal numbers: pyreft pads with −1, which only its own datasets can use.
UNTIED = {"tied": False, "positions": "f3+l3"}
PYREFT = {
    "loreft": {},
    "loreft-untied": {**UNTIED},
    "loreft-relu": {"activation": "relu"},
    "loreft-some_layers": {"layers": [2, 0], "positions": "l2"},
    "loreft-null_rank": {"null_rank": True},
    "loreft-bfloat16": {"dtype": "bfloat16"},
    "loreft-string": {"component": "model.layers[%s].output"},
    "loreft-string_mlp": {"component": "model.layers[%s].mlp.output"},
    "loreft-mlp": {"component": "mlp_output"},
    "loreft-attention": {"component": "attention_output"},
    "loreft-trainer": {"save": "trainer", **UNTIED},
    "loreft-classifier": {"save": "include_model", "head": True},
    "direft": {"intervention": "direft", "add_bias": False},
    "direft-bias": {"intervention": "direft", "add_bias": True},
    "noreft": {"intervention": "noreft", "add_bias": False, **UNTIED},
    "noreft-bias": {"intervention": "noreft", "add_bias": True},
    "noreft-trainer": {"intervention": "noreft", "add_bias": True, "save": "trainer"},
    "direft_orthonormal": {"intervention": "direft_orthonormal", "activation": "gelu"},
    "direft_orthonormal-trainer": {"intervention": "direft_orthonormal", "save": "trainer"},
    "consreft": {"intervention": "consreft"},
    "lobireft": {"intervention": "lobireft", **UNTIED},
}
OLD = {
    "old-loreft": {**UNTIED},
    "old-string": {"component": "model.layers[%s].output"},
    "old-noreft": {"intervention": "noreft", "add_bias": False},
}
CLASSES = {  # this library's name -> pyreft's class; note the first two
    "direft": "NodireftIntervention",
    "direft_orthonormal": "DireftIntervention",
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}
ADAPTERS = {  # case -> (class of its configuration, arguments)
    "loreft": ("LoReftConfig", {"prefix_positions": 3, "suffix_positions": 2}),
    "loreft-tied": (
        "LoReftConfig",
        {"prefix_positions": 3, "suffix_positions": 2, "tied_weights": True},
    ),
    "loreft-prefix": ("LoReftConfig", {"prefix_positions": 3}),
    "loreft-suffix": (
        "LoReftConfig",
        {"prefix_positions": 0, "suffix_positions": 2, "layers": [0, 2]},
    ),
    "loreft-relu": ("LoReftConfig", {"suffix_positions": 2, "non_linearity": "relu"}),
    "noreft": ("NoReftConfig", {"prefix_positions": 2, "suffix_positions": 2}),
    "direft": ("DiReftConfig", {"prefix_positions": 2, "suffix_positions": 2}),
    "loreft-classifier": ("LoReftConfig", {"suffix_positions": 2, "head": True}),
    "loreft-safetensors": ("LoReftConfig", {"suffix_positions": 2, "use_safetensors": True}),
}


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (2, 11), generator=generator)


def base_model(head: bool = False) -> nn.Module:
    kind = LlamaForSequenceClassification if head else LlamaForCausalLM
    model = kind(LlamaConfig(**BASE))
    stored = load_file(FIXTURES / "base.safetensors")
    wanted = set(model.state_dict())
    model.load_state_dict({key: stored[key] for key in wanted})
    return model.eval()


def write_base() -> None:
    torch.manual_seed(1)
    tensors = LlamaForCausalLM(LlamaConfig(**BASE)).state_dict()
    tensors["score.weight"] = torch.randn(LABELS, DIM)
    save_file(tensors, FIXTURES / "base.safetensors", {"config": json.dumps(BASE)})


def write_goldens(name: str, tensors: dict[str, Tensor], cases: dict, packages: list[str]) -> None:
    facts = {
        "made_by": "tests/reft/interop/make_fixtures.py",
        "versions": {package: version(package) for package in [*packages, "torch", "transformers"]},
        "cases": cases,
    }
    tensors = {"input_ids": inputs(), **tensors}
    save_file(tensors, FIXTURES / f"{name}.safetensors", {"golden": json.dumps(facts)})


def drift(module: nn.Module) -> None:
    """Randomise every parameter; of R only the part below the diagonal, as training does."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            step = 0.3 * torch.randn(parameter.shape)
            if name.endswith("original"):
                tall = parameter.shape[0] > parameter.shape[1]
                step = step.tril(-1) if tall else step.triu(1)
            parameter.add_(step.to(parameter.dtype))


# ------------------------------------------------------------------- pyreft


def places(positions: str, tied: bool, layers: int, length: int) -> list[list[int]]:
    """Return pyreft's positions for each intervention: all layers, then again if untied."""
    import pyreft

    first, last = pyreft.dataset.parse_positions(positions)
    return pyreft.dataset.get_intervention_locations(
        last_position=length,
        first_n=first,
        last_n=last,
        num_interventions=layers * (1 if tied else 2),
        share_weights=tied,
    )


def pyreft_case(folder: Path, case: dict) -> Tensor:
    """Make, randomise and save a model into ``folder``; return its logits."""
    import pyreft

    torch.manual_seed(3)
    dtype = getattr(torch, case["dtype"])
    base = base_model(head="head" in case).to(dtype)
    options = {"act_fn": case["activation"], "dtype": dtype}
    if "add_bias" in case:
        options["add_bias"] = case["add_bias"]
    representations, modules = [], []
    for layer in case["layers"] * (1 if case["tied"] else 2):
        kind = getattr(pyreft.interventions, CLASSES[case["intervention"]])
        modules.append(kind(embed_dim=DIM, low_rank_dimension=RANK, **options))
        drift(modules[-1])
        component = case["component"]
        representation = {"component": component, "intervention": modules[-1]}
        if "%s" in component:
            representation["component"] = component % layer
        else:
            representation["layer"] = layer
        if "null_rank" not in case:
            representation["low_rank_dimension"] = RANK
        representations.append(representation)
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    if "head" in case:
        for parameter in model.model.score.parameters():
            parameter.requires_grad = True
        drift(model.model.score)
    ids = inputs()
    where = places(case["positions"], case["tied"], len(case["layers"]), ids.shape[1])
    with torch.no_grad():
        _, output = model(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations={"sources->base": (None, [[row] * ids.shape[0] for row in where])},
        )
        plain = base(input_ids=ids).logits
    assert not torch.allclose(output.logits, plain, atol=0.05)
    shutil.rmtree(folder, ignore_errors=True)
    if case["save"] == "trainer":
        pyreft.ReftTrainer.save_model(
            SimpleNamespace(model=model), str(folder / "checkpoint-4"), _internal_call=True
        )
    elif case["save"] == "include_model":
        model.save(str(folder), include_model=True)
    else:
        model.save(str(folder))
    return output.logits.clone()


def make_pyreft(name: str, cases: dict[str, dict]) -> None:
    described = {case: PLAIN | changes for case, changes in cases.items()}
    tensors = {
        f"{case}/logits": pyreft_case(FIXTURES / "pyreft" / case, described[case])
        for case in described
    }
    write_goldens(name, tensors, described, ["pyreft", "pyvene"])


# ------------------------------------------------------------------- adapters


def adapters_case(folder: Path, kind: str, arguments: dict) -> Tensor:
    import adapters

    arguments = dict(arguments)
    safe = arguments.pop("use_safetensors", False)
    head = arguments.pop("head", False)
    torch.manual_seed(3)
    model = base_model(head)
    adapters.init(model)
    model.add_adapter("edit", config=getattr(adapters, kind)(r=RANK, **arguments))
    model.set_active_adapters("edit")
    for name, module in model.named_modules():
        if name.endswith("refts.edit"):
            drift(module)
    if head:
        drift(model.score)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=inputs()).logits
        plain = base_model(head)(input_ids=inputs()).logits
    assert not torch.allclose(logits, plain, atol=0.05)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(folder), "edit", with_head=head, use_safetensors=safe)
    return logits


def make_adapters() -> None:
    goldens, cases = {}, {}
    for case, (kind, arguments) in ADAPTERS.items():
        folder = FIXTURES / "adapters" / case
        goldens[f"{case}/logits"] = adapters_case(folder, kind, arguments)
        cases[case] = {"config": kind, **arguments}
    write_goldens("adapters", goldens, cases, ["adapters"])


def main(which: str) -> None:
    torch.set_num_threads(1)
    FIXTURES.mkdir(exist_ok=True)
    if which == "adapters":
        make_adapters()
    elif which == "pyreft-old":
        make_pyreft(which, OLD)
    elif which == "pyreft":
        write_base()
        make_pyreft(which, PYREFT)
    else:
        raise SystemExit("give one of pyreft, pyreft-old, adapters")
    for file in FIXTURES.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert stored.keys()


if __name__ == "__main__":
    main(*sys.argv[1:])
