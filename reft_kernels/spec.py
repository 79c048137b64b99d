"""The family table and the values that describe one edit.

Every ReFT variant is the same low-rank edit with other switches:

    h' = h + Rᵀ ( act(W h + b) − σ R h )            W, R: (r, D)   b: (r,)   σ ∈ {0, 1}

Each variant is a row of :data:`FAMILY`. The code below this table never asks for a variant by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class EditSpec:
    """One member of the family.

    Attributes:
        name: the name used in configurations.
        has_encode: whether W is a parameter; without it the edit is Rᵀ(b − σ R h).
        subtract: σ = 1.
        orthonormal: whether the rows of R are kept orthonormal.
        paper: the name in arXiv 2404.03592.
        pyreft: the class of pyreft 0.1.0 that computes it. Two names are swapped: the paper's
            DiReFT is pyreft's ``NodireftIntervention``, and pyreft's ``DireftIntervention`` is an
            ablation.
    """

    name: str
    has_encode: bool
    subtract: bool
    orthonormal: bool
    paper: str
    pyreft: str


_ROWS = (
    EditSpec("loreft", True, True, True, "LoReFT (eq. 2)", "LoreftIntervention"),
    EditSpec("direft", True, False, False, "DiReFT (eq. 3)", "NodireftIntervention"),
    EditSpec("noreft", True, True, False, "ablation, free R", "NoreftIntervention"),
    EditSpec("direft_orthonormal", True, False, True, "ablation, Rᵀ(Wh + b)", "DireftIntervention"),
    EditSpec("consreft", False, True, True, "ablation, Rᵀ(b − Rh)", "ConsreftIntervention"),
    EditSpec("lobireft", False, False, True, "ablation, Rᵀb", "LobireftIntervention"),
)

#: name -> :class:`EditSpec`, read-only.
FAMILY = MappingProxyType({spec.name: spec for spec in _ROWS})


class EditWeights(NamedTuple):
    """The parameters of one edit, h' = h + Rᵀ(act(A h + b) − σ R h), and its two switches.

    A named tuple: engines that shard parameters look for tensors in tuples that a module returns.

    Attributes:
        encode: A or W, (r, D) or (g, r, D); None if the edit has no learned projection.
        bias: b, (r,) or (g, r); None for zero.
        decode: R, (r, D) or (g, r, D).
        subtract: σ = 1.
        activation: name of the activation; None for the identity.
    """

    encode: Tensor | None
    bias: Tensor | None
    decode: Tensor
    subtract: bool = False
    activation: str | None = None


class SavedRows(NamedTuple):
    """The tensors that an edit saves for backward, each None if no gradient needs it.

    Attributes:
        x: (n, D), the rows before the edit, in hidden's dtype.
        s: (n, r), their coefficients act(u) − σ R h.
        u: (n, r), the argument of the activation.
    """

    x: Tensor | None = None
    s: Tensor | None = None
    u: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients backward returns; the others are None."""

    hidden: bool
    encode: bool
    bias: bool
    decode: bool


def fold(
    encode: Tensor | None, decode: Tensor, subtract: bool, activation: str | None
) -> tuple[Tensor | None, bool]:
    """Fold the subtraction into the encoder where that is exact.

    Without an activation, act(W h + b) − R h = (W − R) h + b. ``A = W − R`` is formed once, an r·D
    subtraction that autograd routes to W and R, and the kernels compute one formula. With an
    activation the two terms cannot be joined, and the arguments are returned unchanged.

    Args:
        encode: W, (r, D) or (g, r, D), or None.
        decode: R, of the same shape.
        subtract: σ = 1.
        activation: name of the activation, None for the identity.

    Returns:
        (encode, subtract) of the equivalent edit that remains to be computed.
    """
    if not subtract or (activation is not None and encode is not None):
        return encode, subtract
    return (-decode if encode is None else encode - decode), False
