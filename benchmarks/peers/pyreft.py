"""pyreft 0.1.0 from PyPI: its interventions, its gather and scatter, and its wrapped model."""

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
    """Build the steps of pyvene's hook: clone, gather, intervene, scatter.

    Args:
        given: make R a plain parameter, so that only the edit is timed, as for the other peers.
            Otherwise torch's parametrisation computes R at every access, as in pyreft.
    """
    _library()
    from pyreft.interventions import LowRankRotateLayer
    from pyvene.models.modeling_utils import gather_neurons, scatter_neurons
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype, device = DTYPES[case.dtype], edit.hidden.device
    settings = LlamaConfig(hidden_size=case.dim)
    assert edit.encode is not None and edit.bias is not None
    stacks = [
        weights if case.groups > 1 else weights[None]
        for weights in (edit.encode, edit.bias, edit.decode)
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
        # Gradients of two groups are not compared: their names are those of no argument.
        suffix = "" if case.groups == 1 else str(group)
        source, rotate = module.learned_source, module.rotate_layer
        leaves |= {f"encode{suffix}": source.weight, f"bias{suffix}": source.bias}
        if given:
            leaves[f"decode{suffix}.T"] = rotate.weight
        else:
            leaves[f"free{suffix}"] = rotate.parametrizations.weight.original
    offsets = edit.plan.offsets
    positions = [
        (edit.plan.rows[a:b] % case.sequence).view(case.batch, -1).tolist()
        for a, b in itertools.pairwise(offsets)
    ]

    def call(hidden: Tensor) -> Tensor:
        for module, locations in zip(modules, positions, strict=True):
            selected = gather_neurons(hidden.clone(), "pos", locations, device=device)
            edited = module(selected, None, None)
            hidden = scatter_neurons(
                hidden, edited, "block_output", "pos", locations, LlamaForCausalLM, settings,
                False, device=device,
            )  # fmt: skip
        return hidden

    return Operator(call, leaves, capturable=False)  # each call copies positions from a list


def rotation(case: RotationCase, device: torch.device) -> Rotation:
    """Evaluate R of each layer three times, as its forward does."""
    _library()
    if case.dim >= 4096 and case.layers > 4:
        raise Absent("takes minutes: it completes each R to D × D; see the cases with fewer layers")
    modules = [
        _loreft(case.dim, case.rank, torch.float32).to(device).rotate_layer
        for _ in range(case.layers)
    ]

    def call() -> list[Tensor]:
        rotations = []
        for module in modules:
            _ = module.weight.dtype  # ``x.to(self.weight.dtype)``
            rotations += [module.weight, module.weight]
        return rotations

    return Rotation(
        call,
        [parameter for module in modules for parameter in module.parameters()],
        sum(b.numel() * b.element_size() for module in modules for b in module.buffers()),
    )


def wrap(tied: bool, base: nn.Module, case: ModelCase) -> Wrapped:
    """Wrap with ``pyreft.get_reft_model``: an intervention per edited block, two if untied."""
    pyreft = _library()
    if not tied and "+" not in case.positions:
        raise Absent(f"positions {case.positions!r} have one end, so there is nothing to untie")
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
        """Positions of shape (B, interventions, positions), as pyreft's collator passes them."""
        per_intervention = [positions for positions in groups for _ in case.edited_layers]
        return torch.tensor(per_intervention).expand(batch, -1, -1)

    def compute_loss(batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {**batch, "intervention_locations": locations(batch["input_ids"].shape[0])}
        loss: Tensor = pyreft.ReftTrainer.compute_loss(None, model, inputs)
        return loss

    def generate(prompts: Tensor, count: int) -> Tensor:
        units = locations(prompts.shape[0]).permute(1, 0, 2).tolist()
        tokens: Tensor
        _, tokens = model.generate(
            {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)},
            unit_locations={"sources->base": (None, units)},
            intervene_on_prompt=True,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return tokens

    interventions = model.interventions.values()
    trainable = [parameter for module in interventions for parameter in module.parameters()]
    return Wrapped(compute_loss, trainable, model, generate, model.save)


def load(base: nn.Module, folder: str) -> Any:
    """Load with ``pyreft.ReftModel.load``."""
    return _library().ReftModel.load(folder, base)


_NOTE = "evaluates its orthonormal parametrisation three times per forward"
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
    Peer(
        "pyreft, R given",
        _VERSION,
        partial(edit, True),
        note="its edit alone; R is a plain parameter",
    ),
    Peer("pyreft, untied", _VERSION, wrap=partial(wrap, False), note=_NOTE),
)
