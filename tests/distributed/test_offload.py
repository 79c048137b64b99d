"""Training on an offloaded base, on disk or in CPU memory, gives the same bits as without
offloading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from three_steps import CASES, batch, largest_difference, make_base, make_trainer, trained
from tiny_models import LAYERS
from torch import nn
from transformers import LlamaForCausalLM

from reft import ReftConfig, get_reft_model

REST = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
DISK = {
    "nothing": (),
    "one layer": ("model.layers.1",),
    "all layers": tuple(f"model.layers.{layer}" for layer in range(LAYERS)),
}


def mapped(folder: Path, disk: tuple[str, ...]) -> LlamaForCausalLM:
    """Load the base of the other tests with these modules on disk."""
    make_base().save_pretrained(folder / "base")
    places = {name: "disk" if name in disk else "cpu" for name in (*DISK["all layers"], *REST)}
    return LlamaForCausalLM.from_pretrained(
        folder / "base",
        device_map=places if disk else {"": "cpu"},
        offload_folder=folder / "offload",
    )


def hooks(base: nn.Module) -> dict[str, object]:
    """Return accelerate's hooks by module name."""
    return {
        name: module._hf_hook
        for name, module in base.named_modules()
        if hasattr(module, "_hf_hook")
    }


def test_hooks_are_seen(tmp_path):
    base = mapped(tmp_path, DISK["one layer"])
    assert hooks(base) and next(base.model.layers[1].parameters()).is_meta


@pytest.mark.parametrize(
    ("places", "name"),
    [("nothing", "plain"), ("one layer", "checkpointing"), ("all layers", "plain")],
)
def test_a_trainer_with_a_device_map(places, name, tmp_path):
    base = mapped(tmp_path, DISK[places])
    before = hooks(base)
    trainer = make_trainer(CASES[name], tmp_path / "run", base=base)
    adapter = trainer.model.reft.adapter("default")
    assert {parameter.device.type for parameter in adapter.parameters()} == {"cpu"}
    whole = make_trainer(CASES[name], tmp_path / "whole")
    result, expected = trained(trainer), trained(whole)
    assert largest_difference(result["weights"], expected["weights"]) == 0
    assert result["losses"] == expected["losses"]
    inputs = {key: value for key, value in batch(3).items() if key != "labels"}
    how = {"max_new_tokens": 4, "do_sample": False}
    texts = [run.model.eval().generate(**inputs, **how) for run in (trainer, whole)]
    assert torch.equal(*texts)
    trainer.model.unload()
    assert hooks(base) == before
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits, make_base()(**inputs).logits)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloading_by_hand(where, tmp_path):
    """The parameters of a module are loaded for its forward only. Trainer would move such a base,
    which is impossible; the loop is written out here."""
    base, device = make_base(), torch.device("cpu")
    if where == "memory":
        base = cpu_offload(base, execution_device=device)
    else:
        base = disk_offload(base, tmp_path, execution_device=device)
    assert all(parameter.is_meta for parameter in base.parameters())
    weights = []
    for base_model in (base, make_base()):
        model = get_reft_model(
            base_model,
            ReftConfig(rank=4, positions="f2+l2"),
            generator=torch.Generator().manual_seed(0),
        ).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(**batch(4)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.reft.adapter("default").training_state())
    assert largest_difference(*weights) == 0


def test_a_head_that_is_offloaded_is_refused(tmp_path):
    base = mapped(tmp_path, ("lm_head",))
    before = [*base.named_modules()]
    with pytest.raises(ValueError, match=r"'lm_head' here: its weight is offloaded.*device_map"):
        get_reft_model(base, ReftConfig(rank=2, modules_to_save=("lm_head",)))
    assert [*base.named_modules()] == before
