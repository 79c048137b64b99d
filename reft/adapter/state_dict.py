"""State dictionaries of banks.

An orthonormal R is its coordinates ``free`` around a start ``base``, so that one without the other
would be another R. What does not fit is refused before anything is loaded, with ``strict`` or
without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

#: Names that the tensors of a bank can have.
NAMES = ("weight", "bias", "free", "base", "decode")


def check_state(
    adapter: nn.Module, state: Mapping[str, Any], prefix: str, *, whole: bool = False
) -> None:
    """Refuse what a state dict has for a bank, if it does not fit or is half an R.

    Args:
        bank: a :class:`reft.adapter.parameters.AdapterParameters`.
        state: the state dict; what it has for other modules is not looked at.
        prefix: of the bank's keys in it.
        whole: whether all of the bank's keys must be there. torch looks for missing ones itself,
            where that is asked for.

    Raises:
        RuntimeError: as above, with the keys.
    """
    tensors = {name: one for name in NAMES if (one := getattr(adapter, name, None)) is not None}
    given = {name: state[f"{prefix}{name}"] for name in NAMES if f"{prefix}{name}" in state}
    where = prefix.removesuffix(".") or "the adapter"
    strange = [name for name in given if name not in tensors]
    if strange:
        raise RuntimeError(
            f"state_dict must hold an adapter of the same kind; for {where} it has "
            f"{', '.join(strange)}, which this one has not (it has {', '.join(tensors)}). Nothing "
            "was loaded"
        )
    missing = [name for name in tensors if name not in given]
    if whole and missing:
        raise RuntimeError(
            f"state_dict must hold {prefix}{missing[0]}: every key of an adapter is needed, and of "
            f"{where} it lacks {', '.join(missing)}. Nothing was changed"
        )
    for there, absent in (("free", "base"), ("base", "free")):
        if there in given and absent in missing:
            raise RuntimeError(
                f"state_dict must hold {prefix}{absent} beside {prefix}{there}: R is made of both, "
                "and one alone is another R. Take the state_dict() of the whole model, or of the "
                "whole adapter. Nothing was changed"
            )
    for name, value in given.items():
        wanted = shape_of(tensors[name])
        # DeepSpeed's ZeRO 3 puts an empty tensor in the place of a parameter that it has in parts.
        if shape_of(value) not in (wanted, tuple(tensors[name].shape)):
            raise RuntimeError(
                f"state_dict must hold {prefix}{name} of shape {wanted}, got {shape_of(value)}: "
                "the adapter has other layers, another rank or another width. Nothing was changed"
            )


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor, of the whole of it where an engine holds it in parts."""
    shape: Any = getattr(value, "ds_shape", None) or getattr(value, "shape", ())
    return tuple(shape)


def beside(base: Tensor, free: Tensor | None) -> Tensor:
    """``base``, which every rank has whole, as engines want to find it beside ``free``: where that
    is in parts a state dict must hold nothing else than what knows its mesh; memory is shared."""
    if not isinstance(free, DTensor) or isinstance(base, DTensor):
        return base
    mesh = free.device_mesh
    return DTensor.from_local(base, mesh, [Replicate()] * mesh.ndim, run_check=False)


def apart(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give each name of a tied weight memory of its own, as files of safetensors ask for, of which
    transformers makes one of a whole wrapper's state; a hook of torch's. Parameters themselves,
    and what an engine holds in parts, stay."""
    seen: set[tuple[int, int]] = set()
    for name, value in state.items():
        if not name.startswith(prefix) or type(value) is not Tensor or value.is_meta:
            continue
        memory = (value.data_ptr(), value.numel())
        if value.numel() and memory in seen:
            state[name] = value.clone()
        seen.add(memory)
