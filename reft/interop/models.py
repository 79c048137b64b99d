"""Models with adapters of other libraries, and adapters of models for pyreft."""

from __future__ import annotations

import os
from dataclasses import replace

from torch import nn

from reft.config import COMPONENTS
from reft.interop.from_adapters import read_adapters
from reft.interop.from_pyreft import read_pyreft
from reft.interop.to_pyreft import write_pyreft
from reft.interop.units import Converted
from reft.model import peft_compat as peft_base
from reft.model.blocks import ModelBlocks, find_blocks
from reft.model.components import MODULE
from reft.model.modules_to_save import module_tensors
from reft.model.reft_model import ReftModel
from reft.model.save_load import attach_tensors

#: The modules that pyreft means by these names in blocks of Llama's kind.
_PARTS = {"attention_output": "self_attn", "mlp_output": "mlp"}

_Path = str | os.PathLike[str]


def load_pyreft(
    path: _Path,
    base_model: nn.Module,
    *,
    positions: str,
    intervention: str | None = None,
    activation: str | None = None,
    dropout: float = 0.0,
    dropout_on: str = "row",
    short_prompts: str = "pyreft",
    prompt_end: str = "last",
    head: bool = True,
    block_path: str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> ReftModel:
    """Load an adapter that pyreft saved, on a base model.

    Both the folders of ``ReftModel.save`` and the checkpoints of pyreft's trainer can be read.
    Trained parameters of the base become ``modules_to_save``. pyreft stores only tensors: pass the
    same positions, activation and dropout that were passed to pyreft.

    Args:
        path: the folder with ``intkey_*.bin``, or the ``checkpoint-N`` around it.
        base_model: a transformers model; changed in place until :meth:`ReftModel.unload`.
        positions: see :class:`ReftConfig`. One unit per layer makes tied weights, two make untied
            weights.
        intervention: required if no config.json names the class and the tensors allow two members:
            "noreft" or "direft", "consreft" or "lobireft". pyreft's *Nodireft* is "direft", its
            *Direft* is "direft_orthonormal".
        activation: pyreft's ``act_fn``.
        dropout: pyreft's dropout, used in further training only.
        dropout_on: "row" as in pyreft.
        short_prompts: "pyreft" as in pyreft's datasets.
        prompt_end: "second_to_last" for an adapter that was trained on ``ReftSupervisedDataset``,
            ``ReftGenerationDataset``, ``ReftClassificationDataset`` or ``ReftRewardDataset``.
        head: read trained parameters of the base (``pytorch_model.bin``) as ``modules_to_save``.
        block_path: name of the list of blocks; None to take it from the folder or the model.
        adapter_name: name of the adapter.
        is_trainable: make the adapter trainable; else it is frozen and the model is in eval mode.

    Returns:
        The model. W, b and R are float32, which represents pyreft's bfloat16 exactly.

    Raises:
        OSError: the folder does not exist, or has no files of pyreft.
        TypeError, ValueError: a damaged file, a pickle with code (never run), interventions that do
            not fit one configuration, or an adapter that does not fit the model. The base model is
            unchanged.
    """
    converted = read_pyreft(
        path,
        intervention=intervention,
        head=head,
        positions=positions,
        activation=activation,
        dropout=dropout,
        dropout_on=dropout_on,
        short_prompts=short_prompts,
        prompt_end=prompt_end,
        block_path=block_path,
    )
    sites = find_blocks(peft_base.transformers_model(base_model), converted.config.block_path)
    component = _by_pyreft(converted.config.component, sites)
    converted = replace(converted, config=replace(converted.config, component=component))
    return _registry(converted, path, base_model, adapter_name, is_trainable)


def load_adapters_reft(
    path: _Path,
    base_model: nn.Module,
    *,
    intervention: str | None = None,
    positions: str | None = None,
    dropout: float | None = None,
    short_prompts: str = "pyreft",
    prompt_end: str = "last",
    head: bool = False,
    block_path: str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> ReftModel:
    """Load a ReFT adapter that the library adapters saved, on a base model.

    In adapters, suffix positions are the last tokens of the whole input, including the answer in
    training; in reft, they are the last tokens of the prompt. For encoders, whose prompt is the
    whole input, both are the same.

    Args:
        path: the folder with ``adapter_config.json``.
        base_model: a transformers model; changed in place until :meth:`ReftModel.unload`.
        intervention: required if R is not orthonormal: "direft" for a ``DiReftConfig``, "noreft"
            for a ``NoReftConfig``. The folder does not distinguish them, and adapters itself loads
            a DiReFT as NoReFT.
        positions: None for the stored positions, such as "f3+l3".
        dropout: None for the stored dropout, on whole rows.
        short_prompts: see :class:`ReftConfig`. adapters edits tokens of short inputs twice, which
            no option reproduces.
        prompt_end: see :class:`ReftConfig`.
        head: also read the prediction head, as ``modules_to_save``.
        block_path: name of the list of blocks; None to detect it.
        adapter_name: name of the adapter.
        is_trainable: make the adapter trainable; else it is frozen and the model is in eval mode.

    Raises:
        OSError: the folder does not exist, or a file is missing in it.
        TypeError, ValueError: a damaged file, an adapter that is not ReFT, or one that does not fit
            the model. The base model is unchanged.
    """
    overrides = {"positions": positions, "dropout": dropout}
    converted = read_adapters(
        path,
        intervention=intervention,
        head=head,
        short_prompts=short_prompts,
        prompt_end=prompt_end,
        block_path=block_path,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    return _registry(converted, path, base_model, adapter_name, is_trainable)


def save_pyreft(model: ReftModel, path: _Path, adapter_name: str | None = None) -> None:
    """Write an adapter in pyreft's format, for ``pyreft.ReftModel.load``.

    pyreft does not store positions, activation, dropout, dtype and the options of short prompts.
    It loads W and b as bfloat16. It cannot load "noreft" and "direft"; use ``load_state_dict`` of
    its classes for their files. An orthonormal R is written as D × D numbers for every member but
    "loreft", as in pyreft.

    Args:
        model: a model with the adapter.
        path: a new or empty folder, written in one atomic step.
        adapter_name: None for the active adapter.

    Raises:
        OSError: the folder is not empty or cannot be written.
        ValueError: the adapter does not exist, or pyreft has no name for its component.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    if name is None:
        raise ValueError("adapter_name must be given, no adapter is active")
    registry = model._registry
    adapter = registry.adapter(name)
    heads = module_tensors(registry.modules_to_save.modules_of(model.get_base_model(), name))
    names = {_by_pyreft(component, registry.blocks): component for component in COMPONENTS}
    component = names.get(adapter.config.component)
    if component is None and adapter.config.component in COMPONENTS:
        raise ValueError(
            "component must be one that pyreft edits, "
            f"{adapter.config.component!r} of this model is "
            f"the output of a norm; pyreft has {', '.join(map(repr, names))}"
        )
    config = replace(adapter.config, component=component or adapter.config.component)
    write_pyreft(path, config, adapter.layers, adapter.export_state_dict(), heads)


def _registry(
    converted: Converted, path: _Path, base_model: nn.Module, name: str, is_trainable: bool
) -> ReftModel:
    """Add a converted adapter to a base model. If it does not fit, restore the base model."""
    model = ReftModel(base_model, converted.config.block_path)
    try:
        sites = model._registry.blocks
        if converted.dim != sites.dim:
            raise ValueError(
                f"{os.fspath(path)}: base_model must have the width {converted.dim} of the "
                f"adapter, {type(base_model).__name__} has {sites.dim}"
            )
        attach_tensors(
            model._registry, model.get_base_model(), path, name,
            converted.config, converted.tensors, converted.heads,
        )  # fmt: skip
        model.set_adapter(name, inference_mode=not is_trainable)
    except BaseException:
        model.unload()
        raise
    return model if is_trainable else model.eval()


def _by_pyreft(component: str, sites: ModelBlocks) -> str:
    """Translate pyreft's name of a component for the blocks of this model.

    If a norm is applied between a submodule and the residual sum, as in Gemma 2, pyreft's name
    means the output of the submodule, and reft's name the output of the norm.
    """
    part = _PARTS.get(component)
    block = sites.layers[0]
    if part is None or part not in dict(block.named_modules()):
        return component
    inside = set(block.get_submodule(part).modules())
    return component if sites.module(0, component) in inside else f"{MODULE}{part}"
