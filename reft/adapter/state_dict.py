"""State dicts of :class:`reft.adapter.parameters.AdapterParameters`.

An orthonormal R is stored as coordinates ``free`` around a point ``base``: either one without the
other would give another R. A state dict that does not fit is refused before anything is loaded,
with ``strict`` or without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

#: Names of the tensors that an adapter can have.
NAMES = ("weight", "bias", "free", "base", "decode")


def check_state_dict(
    adapter: nn.Module, state_dict: Mapping[str, Any], prefix: str, *, complete: bool = False
) -> None:
    """Refuse a state dict whose values for an adapter do not fit or lack half of R.

    Args:
        adapter: an :class:`reft.adapter.parameters.AdapterParameters`.
        state_dict: may hold keys of other modules, which are ignored.
        prefix: of the adapter's keys.
        complete: require all keys of the adapter. Otherwise torch reports missing keys, if its
            caller asks for that.

    Raises:
        RuntimeError: as above, with the keys.
    """
    present = {name: getattr(adapter, name, None) for name in NAMES}
    tensors = {name: tensor for name, tensor in present.items() if tensor is not None}
    given = {
        name: state_dict[f"{prefix}{name}"] for name in NAMES if f"{prefix}{name}" in state_dict
    }
    where = prefix.removesuffix(".") or "the adapter"
    unexpected = [name for name in given if name not in tensors]
    if unexpected:
        raise RuntimeError(
            f"state_dict must hold an adapter of the same kind; for {where} it has "
            f"{', '.join(unexpected)}, which this one does not have (it has "
            f"{', '.join(tensors)}). Nothing was loaded"
        )
    missing = [name for name in tensors if name not in given]
    if complete and missing:
        raise RuntimeError(
            f"state_dict must hold {prefix}{missing[0]}: every key of an adapter is needed, and of "
            f"{where} it lacks {', '.join(missing)}. Nothing was changed"
        )
    for key, other in (("free", "base"), ("base", "free")):
        if key in given and other in missing:
            raise RuntimeError(
                f"state_dict must hold {prefix}{other} beside {prefix}{key}: R is made of both, "
                "and one alone is another R. Take the state_dict() of the whole model, or of the "
                "whole adapter. Nothing was changed"
            )
    for name, value in given.items():
        expected = full_shape(tensors[name])
        # ZeRO-3 has an empty placeholder for each parameter that it has sharded.
        if full_shape(value) not in (expected, tuple(tensors[name].shape)):
            raise RuntimeError(
                f"state_dict must hold {prefix}{name} of shape {expected}, got "
                f"{full_shape(value)}: the adapter has other layers, another rank or another "
                "width. Nothing was changed"
            )


def full_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor before it was sharded."""
    shape: Any = getattr(tensor, "ds_shape", None) or getattr(tensor, "shape", ())
    return tuple(shape)


def replicated_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return ``tensor``, which every rank holds in full, as a DTensor if ``like`` is one: a state
    dict of FSDP2 must not mix DTensors with other tensors. Memory is shared."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def unshare_memory(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give every key of a tied weight its own memory; a state dict hook.

    transformers saves the state dict of a whole wrapper with safetensors, which refuses shared
    memory. Parameters and sharded tensors are not touched.
    """
    seen: set[tuple[int, int]] = set()
    for name, value in state_dict.items():
        if not name.startswith(prefix) or type(value) is not Tensor or value.is_meta:
            continue
        memory = (value.data_ptr(), value.numel())
        if value.numel() and memory in seen:
            state_dict[name] = value.clone()
        seen.add(memory)
