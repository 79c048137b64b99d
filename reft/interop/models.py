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
from reft.model import peft_compat
from reft.model.blocks import ModelBlocks, find_blocks
from reft.model.components import MODULE
from reft.model.modules_to_save import module_tensors
from reft.model.reft_model import ReftModel
from reft.model.save_load import attach_tensors, name_or_active

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
    """A base model with an adapter that pyreft saved.

    Reads what ``ReftModel.save`` wrote (with its trained parameters of the base, if any, as
    ``modules_to_save``), and the checkpoints of pyreft's trainer. pyreft stores the tensors alone:
    what it does with them must be said here as it was said to pyreft.

    Args:
        path: the folder with ``intkey_*.bin``, or the ``checkpoint-N`` around it.
        base_model: a transformers model; changed in place until :meth:`ReftModel.unload`.
        positions: as in :class:`ReftConfig`. One unit a layer makes an adapter with tied weights,
            two an untied one.
        intervention: needed where no config.json names the class and its tensors do not tell it:
            "noreft" or "direft", "consreft" or "lobireft". Mind the names: pyreft's *Nodireft* is
            "direft", its *Direft* is "direft_orthonormal".
        activation: pyreft's ``act_fn``.
        dropout: pyreft's; matters for further training alone.
        dropout_on: "row" is what pyreft does.
        short_prompts: "pyreft" is what pyreft's datasets do.
        prompt_end: "second_to_last" for an adapter that was trained on ``ReftSupervisedDataset``,
            ``ReftGenerationDataset``, ``ReftClassificationDataset`` or ``ReftRewardDataset``.
        head: take the parameters of the base that were trained too (``pytorch_model.bin``), as
            ``modules_to_save``.
        block_path: name of the list of blocks, None for the one that the folder or the model's
            structure tells.
        adapter_name: its name.
        is_trainable: attach it trainable; else it is frozen, and the model in eval mode.

    Returns:
        The model. W, b and R are held in float32, which holds pyreft's bfloat16 exactly.

    Raises:
        OSError: no such folder, or no such files in it.
        TypeError, ValueError: a damaged file, a pickle with code in it (never run), a folder
            that one configuration cannot hold, or one that does not fit the model. Nothing was
            changed.
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
    sites = find_blocks(peft_compat.transformers_model(base_model), converted.config.block_path)
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
    """A base model with a ReFT adapter that the library adapters saved.

    What adapters calls the suffix are the last tokens of everything it is given, the answer too
    while it trains; here they are the last tokens of the prompt. A model that is called with whole
    texts, as encoders are, computes the same.

    Args:
        path: the folder with ``adapter_config.json``.
        base_model: a transformers model; changed in place until :meth:`ReftModel.unload`.
        intervention: must be given where R is not orthonormal: "direft" for a ``DiReftConfig``,
            "noreft" for a ``NoReftConfig``. The folder does not tell them apart, and adapters
            itself loads a DiReFT as NoReFT.
        positions: None for the folder's, such as "f3+l3".
        dropout: None for the folder's, on whole rows.
        short_prompts: as in :class:`ReftConfig`. adapters edits short inputs at both ends twice;
            no option does that.
        prompt_end: as in :class:`ReftConfig`.
        head: take the prediction head beside the adapter too, as ``modules_to_save``.
        block_path: name of the list of blocks, None to find it.
        adapter_name: its name.
        is_trainable: attach it trainable; else it is frozen, and the model in eval mode.

    Raises:
        OSError: no such folder, or a file is missing in it.
        TypeError, ValueError: a damaged file, an adapter that is not ReFT, or one that does not
            fit the model. Nothing was changed.
    """
    said = {"positions": positions, "dropout": dropout}
    converted = read_adapters(
        path,
        intervention=intervention,
        head=head,
        short_prompts=short_prompts,
        prompt_end=prompt_end,
        block_path=block_path,
        **{name: value for name, value in said.items() if value is not None},
    )
    return _registry(converted, path, base_model, adapter_name, is_trainable)


def save_pyreft(model: ReftModel, path: _Path, adapter_name: str | None = None) -> None:
    """Write an adapter as pyreft does, for ``pyreft.ReftModel.load``.

    Lost, because pyreft stores none of it: positions, activation, dropout, dtype and the options
    of short prompts. pyreft loads W and b as bfloat16. It cannot load "noreft" and "direft" at all,
    although the files are right: give them to ``load_state_dict`` of its classes. An R that is
    orthonormal is written as D × D numbers for every member but "loreft": pyreft stores those.

    Args:
        model: with the adapter.
        path: a folder that is new or empty; written whole or not at all.
        adapter_name: None for the active one.

    Raises:
        OSError: the folder is not empty or cannot be written.
        ValueError: no such adapter, or a component that pyreft has no name for.
    """
    registry = model._registry
    name = name_or_active(registry, adapter_name)
    adapter = registry.adapter(name)
    heads = module_tensors(registry.modules_to_save.modules_of(model.get_base_model(), name))
    names = {_by_pyreft(one, registry.blocks): one for one in COMPONENTS}
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
    """A model with a converted adapter; if it does not fit, the base model as it was."""
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
    """What pyreft's name of a component is here, in the blocks of this model.

    Where a norm stands between a part and the residual sum, as in Gemma 2, pyreft's names are of
    the part, and this library's of what is added.
    """
    part = _PARTS.get(component)
    block = sites.layers[0]
    if part is None or part not in dict(block.named_modules()):
        return component
    inside = set(block.get_submodule(part).modules())
    return component if sites.module(0, component) in inside else f"{MODULE}{part}"
