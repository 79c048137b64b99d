"""Operations on the weights of an adapter: one :class:`reft_kernels.spec.EditWeights` for each
edited layer, with encode and decode (g, r, D) and bias (g, r) for its g groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reft_kernels.spec import EditWeights

#: The weights of every edited layer, in the order of the adapter's layers.
LayerWeights = tuple[EditWeights, ...]


def map_tensors(function: Callable[[Tensor], Tensor], weights: EditWeights) -> EditWeights:
    """Apply a function to A, b and R of one layer."""
    encode, bias, decode, subtract, activation = weights
    return EditWeights(
        None if encode is None else function(encode),
        None if bias is None else function(bias),
        function(decode),
        subtract,
        activation,
    )


def num_bytes(weights: EditWeights) -> int:
    """Bytes of A, b and R of one layer."""
    tensors = (weights.encode, weights.bias, weights.decode)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def mask_ranks(weights: LayerWeights, active: Tensor | None) -> LayerWeights:
    """Keep the edit in some directions only: rows of the others are zero in A, b and R.

    Args:
        weights: of every layer.
        active: bool (r,); None for all directions.
    """
    if active is None:
        return weights

    def masked(tensor: Tensor) -> Tensor:
        mask = active.to(tensor.device)
        return torch.where(mask if tensor.ndim == 2 else mask.unsqueeze(1), tensor, 0.0)

    return tuple(map_tensors(masked, layer) for layer in weights)


def scale(weights: LayerWeights, factor: float) -> LayerWeights:
    """Multiply the edit of every layer by ``factor``.

    Raises:
        ValueError: σ R h is subtracted beside an activation, inside the edit: then no change of the
            parameters multiplies it.
    """
    if factor == 1.0:
        return weights
    if weights[0].subtract:
        raise ValueError(
            f"adapter_scales must be 1 for an adapter with activation {weights[0].activation!r} "
            f"while it is trained or compiled, got {factor}"
        )
    return tuple(layer._replace(decode=layer.decode * factor) for layer in weights)


def concatenate(weights: Sequence[EditWeights]) -> EditWeights:
    """Concatenate the groups of several adapters at one layer.

    Smaller ranks are padded with zeros: a zero row of R adds nothing, whatever its row of A gives.

    Args:
        weights: of each adapter, with the same switches.
    """
    if len(weights) == 1:
        return weights[0]
    decode = [adapter.decode for adapter in weights]
    rank = max(tensor.shape[1] for tensor in decode)
    dtype = decode[0].dtype
    for tensor in decode[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)

    def joined(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
        if all(tensor is None for tensor in tensors):
            return None
        padded = []
        for tensor, zeros in zip(tensors, like, strict=True):
            value = torch.zeros_like(zeros) if tensor is None else tensor
            missing = rank - value.shape[1]
            padding = (0, missing) if value.ndim == 2 else (0, 0, 0, missing)
            padded.append(F.pad(value.to(dtype), padding))
        return torch.cat(padded)

    rows = joined(decode, decode)
    assert rows is not None
    return weights[0]._replace(
        encode=joined([adapter.encode for adapter in weights], decode),
        bias=joined([adapter.bias for adapter in weights], [tensor[..., 0] for tensor in decode]),
        decode=rows,
    )
