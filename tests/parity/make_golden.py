"""Golden tensors for ``test_pyreft.py``, computed by pyreft itself.

Runs pyreft 0.1.0 and pyvene 0.1.8 as PyPI ships them: its interventions, its position rule, its
dataset and collator, its ``ReftTrainer``. Nothing of this library is imported. Made with Python
3.11, torch 2.13.0 (CPU) and transformers 5.23.0; every file names the versions that made it. To
make the files again::

    python3 -m venv /tmp/pyreft && . /tmp/pyreft/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 accelerate datasets matplotlib safetensors
    pip install --no-deps pyreft==0.1.0 pyvene==0.1.8     # their pins exclude current transformers
    OMP_NUM_THREADS=1 python tests/parity/make_golden.py

What is done about pyreft's peculiarities, so that two libraries can be compared number by number:

* **Sink.** pyreft fills the position lists of short prompts with −1, prepends one pad token to
  every sequence (attention 0, label −100) and adds 1 to all positions: surplus positions all hit
  column 0. Nobody attends that column and no loss reads it, so it reaches neither the logits of
  attended tokens nor any gradient. The batch is stored as pyreft built it, with this column, and
  logits of tokens outside the attention mask are stored but mean nothing.
* **R.** pyreft evaluates the parametrisation of R at every access.
  ``torch.nn.utils.parametrize.cached()`` makes it one tensor a forward, whose gradient is dL/dR;
  the script checks that loss and logits are then bit for bit what they are without the cache.
* **Completion of R.** torch's ``orthogonal`` stores a D × D matrix ``base`` whose first r columns
  are Rᵀ and whose others are random, and Adam's path depends on them. Here they come from the
  Householder reflectors of Rᵀ itself, or are random in the runs named ``completion…``.
* **Trainer.** pyreft's ``compute_loss`` lacks an argument that current trainers pass; a subclass
  drops it. Another method of that subclass keeps the order of the batch.
* **Names.** ``rotation`` is R, (r, D): pyreft's ``rotate_layer.weight`` transposed, or its
  ``proj_layer.weight``.
"""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path

import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from pyreft_runs import (
    FAMILY,
    RANK,
    call,
    collated,
    dataset,
    gradients,
    intervention,
    one_rotation,
    reft_model,
    stacked,
    tensors,
    tiny_model,
    train,
)
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
PACKAGES = ("pyreft", "pyvene", "torch", "transformers", "safetensors")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
STEPS, LEARNING_RATE, COMPLETIONS = 50, 1e-2, (0, 1, 2)

OPERATORS = {  # case -> pyreft's class by this library's name, extra arguments of its constructor
    **{name: (name, {}) for name in FAMILY},
    "loreft-relu": ("loreft", {"act_fn": "relu"}),
    "loreft-gelu": ("loreft", {"act_fn": "gelu"}),
    "direft-relu": ("direft", {"act_fn": "relu"}),
    "direft-gelu": ("direft", {"act_fn": "gelu"}),
    "noreft-projection_bias": ("noreft", {"add_bias": True}),
}
DEFAULTS = {
    "intervention": "loreft",
    "rank": RANK,
    "positions": "f7+l7",
    "tied": True,
    "activation": None,
    "prompt_end": "last",
}
MODELS = {  # case -> what its configuration changes of DEFAULTS
    "loreft-tied": {},
    "loreft-untied": {"tied": False},
    "loreft-unequal": {"tied": False, "positions": "f5+l2"},
    "loreft-first": {"positions": "f3"},
    "loreft-last": {"positions": "l1"},
    "loreft-second_to_last": {"prompt_end": "second_to_last"},
    "loreft-relu": {"activation": "relu"},
    **{name: {"intervention": name} for name in FAMILY if name != "loreft"},
}
POSITIONS = ("f7+l7", "f3", "l1", "f5+l5", "f5+l2", "f1+l3")
log = logging.getLogger("make_golden")


def operator(name: str, dtype: torch.dtype, **extra: object) -> dict[str, Tensor]:
    """base (B, P, D), upstream gradient, output, and the gradient of base and every parameter."""
    torch.manual_seed(5)
    module = intervention(name, rank=3, dim=24, dtype=dtype, **extra)
    base = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, 24).to(dtype)
    with one_rotation([module]):
        output = module(base)
        output.backward(upstream)
        values = tensors(module) | gradients(module)
    assert torch.equal(output, module(base))
    values |= {"base": base.detach(), "grad.base": base.grad}
    return values | {"upstream": upstream, "output": output.detach()}


def whole_model(config: dict) -> dict[str, Tensor]:
    """One forward and backward of the tiny model with pyreft on every layer.

    ``grad.embeddings`` is the gradient of the matrix of input embeddings: it has passed every block
    and every edit. ``positions`` (layers · groups, B, P) are those pyreft used, column 0 the sink.
    """
    base = tiny_model()
    torch.manual_seed(3)
    model, modules = reft_model(
        base, config["intervention"], config["tied"], act_fn=config["activation"]
    )
    batch = collated(base, dataset(config["positions"], config["tied"], config["prompt_end"]))
    embeddings = base.model.embed_tokens.weight.requires_grad_()
    with one_rotation(modules):
        loss, logits = call(model, batch)
        loss.backward()
        values = stacked([tensors(module) | gradients(module) for module in modules])
    values |= {"loss": loss.detach(), "logits": logits.detach()}
    values |= {"grad.embeddings": embeddings.grad.clone()}

    # pyreft as it is, evaluating R at every access, computes the same.
    model.zero_grad()
    loss, logits = call(model, batch)
    loss.backward()
    assert torch.equal(loss, values["loss"]) and torch.equal(logits, values["logits"])
    for key, value in stacked([gradients(module) for module in modules]).items():
        torch.testing.assert_close(value, values[key], atol=1e-6, rtol=1e-5)

    values |= inputs_of(batch)
    values["labels"] = batch["labels"]
    values["positions"] = batch["intervention_locations"].permute(1, 0, 2).long()
    return values


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"].long(),
    }


def training(tied: bool, dtype: torch.dtype, completion: int | None = None) -> dict[str, Tensor]:
    """Losses of 50 steps of LoReFT and the parameters before and after.

    Args:
        completion: seed of a random completion of R; None for the one by reflectors.
    """
    base = tiny_model().to(dtype)
    generator = None if completion is None else torch.Generator().manual_seed(completion)
    torch.manual_seed(4)
    model, modules = reft_model(base, "loreft", tied, dtype=dtype, completion=generator)
    start = stacked([tensors(module) for module in modules])
    losses = train(model, dataset("f7+l7", tied, "last"), STEPS, LEARNING_RATE)
    log.info("tied=%s %s %s: %.4f to %.4f", tied, dtype, completion, losses[0], losses[-1])
    if completion is not None:
        return {"losses": losses}
    end = stacked([tensors(module) for module in modules])
    del end["reflectors"]  # the initial values
    values = {f"start.{key}": value for key, value in start.items()}
    return values | {f"end.{key}": value for key, value in end.items()} | {"losses": losses}


def position_table(positions: str, tied: bool) -> Tensor:
    """pyreft's lists for prompts of 0 … 20 tokens: (21, interventions of a layer, entries).

    −1 is the sink; −2 fills up where a list is shorter than first + last, as those of two
    interventions are unless the prompt is too short for either.
    """
    first, last = pyreft.dataset.parse_positions(positions)
    interventions = 1 if tied or not first or not last else 2
    table = torch.full((21, interventions, first + last), -2)
    for n in range(21):
        lists = get_intervention_locations(
            last_position=n,
            first_n=first,
            last_n=last,
            num_interventions=interventions,
            share_weights=tied,
        )
        for k, row in enumerate(lists):
            table[n, k, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return table


def write(name: str, groups: dict[str, dict[str, Tensor]], **metadata: object) -> None:
    """``golden/<name>.safetensors``: keys "group/tensor", JSON in its metadata under "golden"."""
    versions = {package: version(package) for package in PACKAGES}
    versions["python"] = platform.python_version()
    # One metadata entry: safetensors writes several in random order.
    facts = {"made_by": "tests/parity/make_golden.py", "versions": versions, **metadata}
    flat = {
        f"{group}/{key}": value.contiguous()
        for group, values in groups.items()
        for key, value in values.items()
    }
    path = GOLDEN / f"{name}.safetensors"
    save_file(flat, path, {"golden": json.dumps(facts)})
    path.chmod(0o644)
    log.info("%s: %d tensors, %.0f kB", path.name, len(flat), path.stat().st_size / 1e3)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    GOLDEN.mkdir(exist_ok=True)

    base = tiny_model()
    inputs = inputs_of(collated(base, dataset("f7+l7", True, "last")))
    with torch.no_grad():
        unedited = inputs | {"logits": base(**inputs).logits}
    write(
        "base", {"weights": base.state_dict(), "unedited": unedited}, config=base.config.to_dict()
    )

    runs = {
        f"{case}/{kind}": operator(name, dtype, **extra)
        for case, (name, extra) in OPERATORS.items()
        for kind, dtype in DTYPES.items()
    }
    described = {
        case: {"intervention": name, "activation": extra.get("act_fn")}
        for case, (name, extra) in OPERATORS.items()
    }
    write("operators", runs, cases=described)

    configs = {case: DEFAULTS | changes for case, changes in MODELS.items()}
    runs = {case: whole_model(config) for case, config in configs.items()}
    write("models", runs, cases=configs)

    runs = {}
    for name, tied in (("tied", True), ("untied", False)):
        for kind, dtype in DTYPES.items():
            runs[f"{name}/{kind}"] = training(tied, dtype)
        for seed in COMPLETIONS:
            runs[f"{name}/completion{seed}"] = training(tied, torch.float32, seed)
    write("training", runs, steps=STEPS, learning_rate=LEARNING_RATE, completions=COMPLETIONS)

    tables = {
        f"{positions}/{name}": {"places": position_table(positions, tied)}
        for positions in POSITIONS
        for name, tied in (("tied", True), ("untied", False))
    }
    write("positions", tables)


if __name__ == "__main__":
    main()
