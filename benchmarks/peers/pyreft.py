"""pyreft 0.1.0 as PyPI ships it: its interventions, its gather and scatter, its wrapped model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, ModelCase, OpCase, RotationCase
from benchmarks.machine import installed
from benchmarks.peers import Absent, Operator, Peer, Rotation, Wrapped
from benchmarks.peers.reference import ends, prompt_length
from reft_kernels.devtools.testing import Edit


def _library() -> Any:
    try:
        import pyreft
    except ImportError as error:
        raise Absent(f"pyreft is not installed: {error}; see benchmarks/README.md") from None
    return pyreft


def _loreft(dim: int, rank: int, dtype: torch.dtype) -> Any:
    return _library().LoreftIntervention(
        embed_dim=dim, low_rank_dimension=rank, dtype=dtype, add_bias=False
    )


def edit(given: bool, case: OpCase, edit: Edit) -> Operator:
    """What pyvene's hook does in one call: clone, gather, intervene, scatter.

    With ``given`` R is a plain parameter, so that only the edit is timed, as on the other sides;
    without, it comes from torch's parametrisation at every access, as pyreft has it.
    """
    _library()
    from pyreft.interventions import LowRankRotateLayer
    from pyvene.models.modeling_utils import gather_neurons, scatter_neurons
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype, device = DTYPES[case.dtype], edit.hidden.device
    settings = LlamaConfig(hidden_size=case.dim)
    assert edit.encode is not None and edit.bias is not None
    stacks = [
        one if case.groups > 1 else one[None] for one in (edit.encode, edit.bias, edit.decode)
    ]
    modules: list[Any] = []
    leaves: dict[str, Tensor] = {}
    for group, (weight, bias, rotation) in enumerate(zip(*stacks, strict=True)):
        module = _loreft(case.dim, case.rank, dtype)
        with torch.no_grad():
            module.learned_source.weight.copy_(weight)
            module.learned_source.bias.copy_(bias)
            if given:
                module.rotate_layer = LowRankRotateLayer(case.dim, case.rank, init_orth=False)
                module.rotate_layer.weight.copy_(rotation.T)
            else:
                module.rotate_layer.weight = rotation.T.contiguous().cpu()
        modules.append(module.to(device))
        last = "" if case.groups == 1 else str(group)  # of two groups, gradients are not compared
        source, rotate = module.learned_source, module.rotate_layer
        leaves |= {f"encode{last}": source.weight, f"bias{last}": source.bias}
        if given:
            leaves[f"decode{last}.T"] = rotate.weight
        else:
            leaves[f"free{last}"] = rotate.parametrizations.weight.original
    offsets = edit.plan.offsets
    places = [
        (edit.plan.rows[a:b] % case.sequence).view(case.batch, -1).tolist()
        for a, b in itertools.pairwise(offsets)
    ]

    def call(hidden: Tensor) -> Tensor:
        for module, locations in zip(modules, places, strict=True):
            selected = gather_neurons(hidden.clone(), "pos", locations, device=device)
            edited = module(selected, None, None)
            hidden = scatter_neurons(
                hidden, edited, "block_output", "pos", locations, LlamaForCausalLM, settings,
                False, device=device,
            )  # fmt: skip
        return hidden

    return Operator(call, leaves, capturable=False)  # places are copied from a list in each call


def rotation(case: RotationCase, device: torch.device) -> Rotation:
    """R of each layer, evaluated three times as its forward accesses it."""
    _library()
    if case.dim >= 4096 and case.layers > 4:
        raise Absent("minutes: it completes each layer's R to D × D, see fewer layers")
    modules = [
        _loreft(case.dim, case.rank, torch.float32).to(device).rotate_layer
        for _ in range(case.layers)
    ]

    def call() -> list[Tensor]:
        found = []
        for module in modules:
            _ = module.weight.dtype  # ``x.to(self.weight.dtype)``
            found += [module.weight, module.weight]
        return found

    buffers = [one for module in modules for one in module.buffers()]
    return Rotation(
        call,
        [one for module in modules for one in module.parameters()],
        sum(one.numel() * one.element_size() for one in buffers),
    )


def wrap(tied: bool, base: nn.Module, case: ModelCase) -> Wrapped:
    """``pyreft.get_reft_model`` with an intervention on every edited block, two if untied."""
    pyreft = _library()
    if not tied and "+" not in case.positions:
        raise Absent(f"positions {case.positions!r} have one end: nothing to untie")
    if case.model != "llama":
        raise Absent("pyreft's classifier trainer does not run on this transformers")
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    layers = case.edited_layers * (1 if tied else 2)
    settings = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": case.rank,
                "intervention": _loreft(case.hidden, case.rank, dtype),
            }
            for layer in layers
        ]
    )
    device = next(base.parameters()).device
    model = pyreft.get_reft_model(base, settings)
    model.set_device(device)
    model.disable_model_gradients()
    model.train()
    length = prompt_length(case)
    first, last = ends(case.positions, length)
    front, back = list(range(first)), list(range(length - last, length))
    groups = [front + back] if tied else [front, back]

    def locations(batch: int) -> Tensor:
        """(B, interventions, places), as pyreft's collator hands them over."""
        each = [places for places in groups for _ in case.edited_layers]
        return torch.tensor(each).expand(batch, -1, -1)

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        where = locations(batch["input_ids"].shape[0])
        found: Tensor = pyreft.ReftTrainer.compute_loss(
            None, model, {**batch, "intervention_locations": where}
        )
        return found

    def generate(prompts: Tensor, count: int) -> Tensor:
        where = locations(prompts.shape[0]).permute(1, 0, 2).tolist()
        found: Tensor
        _, found = model.generate(
            {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)},
            unit_locations={"sources->base": (None, where)},
            intervene_on_prompt=True,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return found

    trained = [one for module in model.interventions.values() for one in module.parameters()]
    return Wrapped(loss, trained, model, generate, model.save)


def load(base: nn.Module, folder: str) -> Any:
    """``pyreft.ReftModel.load``."""
    return _library().ReftModel.load(folder, base)


_NOTE = "evaluates its orthonormal parametrisation three times a forward"
_VERSION = installed("pyreft")

PEERS = (
    Peer(
        "pyreft",
        _VERSION,
        partial(edit, False),
        rotation,
        partial(wrap, True),
        load=load,
        note=_NOTE,
    ),
    Peer("pyreft, R given", _VERSION, partial(edit, True), note="its edit alone, R a parameter"),
    Peer("pyreft, untied", _VERSION, wrap=partial(wrap, False), note=_NOTE),
)
