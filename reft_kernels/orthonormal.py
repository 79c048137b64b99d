"""R with orthonormal rows from a free parameter V: r Householder reflectors in compact WY form.

A unit lower trapezoidal V (D, r), columns v_j, represents H(V) = H₁ ⋯ H_r, H_j = I − τ_j v_j v_jᵀ,
τ_j = 2/‖v_j‖². E is the first r columns of I_D. Then

    H(V) E = E − V T V_topᵀ,    T⁻¹ = strict_upper(VᵀV) + diag(1/τ),

where V_top is the first r rows. That is O(D r²) work on O(D r) memory: nothing is ever D × D.
Around a base point, which consists of r reflectors V₀ and r signs s,

    Rᵀ = Q = H(V₀) H(V) E diag(s).

H(V₀) H(V) = H([V₀ V]) is one product of 2r reflectors. So with W = [V₀ V], or W = V without a base,
one formula and one gradient serve both:

    S = strict_upper(WᵀW) + ½ diag(WᵀW),    P = −S⁻¹ W_topᵀ diag(s),    Q = E diag(s) + W P.

Backward, from dQ:

    dP = Wᵀ dQ,    Y = S⁻ᵀ dP,    M = upper(−Y Pᵀ) with its diagonal once,
    dW = dQ Pᵀ + W (strict_upper(M) + Mᵀ),    dW_top −= diag(s) Yᵀ.

The gradient of V is the V half of dW, strictly below the diagonal.

Choice of the map. It has no singular point: the diagonal of V is 1 by definition, so ‖v_j‖ ≥ 1, S
is invertible, and |P| ≤ 2 for every V. Weight decay moves V to 0, which moves R to the base point
and never to a matrix of lower rank. Training starts at V = 0, where the coordinates are those of
``torch.nn.utils.parametrizations.orthogonal(…, orthogonal_map="householder")``. Let
S₀ = diag(−s, 1, …, 1) (D × D). torch's V for the D × D base H(V₀) S₀ is S₀ V diag(−s), which gives
the same R. The coordinates differ by signs only, which change neither SGD nor Adam.

Precision. All steps between input and output are float64, so a float32 R is the float64 one rounded
once. |R Rᵀ − I| is at most the rounding unit 1.2e-7 (measured at D ≥ 768: 8e-9). In float32,
adding D small squares to the 1 on the diagonal already costs 5e-6 (D 768, r 32). Float32 products
may also run in TF32, or in bfloat16 under autocast; neither affects float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reft_kernels.dispatch import is_batched, within_transform

#: Largest |R Rᵀ − I| that :func:`reflector_base` accepts as the rounding of an orthonormal R, for
#: example one stored in bfloat16. Its result is exactly orthonormal and that close to its argument.
ORTHONORMAL_WITHIN = 0.1

_DTYPES = (torch.float32, torch.float64)


def orthonormalize(v: Tensor, base: Tensor | None = None) -> Tensor:
    """Compute R = (H(V₀) H(V) E diag(s))ᵀ, with orthonormal rows for any finite V.

    Without a base R = (H(V) E)ᵀ, the transpose of ``torch.linalg.householder_product`` of V and τ.
    Differentiable in v any number of times and within transforms of torch.func; under torch.compile
    once. Batch entries are independent. No host synchronisation; autocast has no effect.

    Args:
        v: (…, D, r) with 1 ≤ r ≤ D, float32 or float64, any strides. Only its strictly lower
            trapezoid is read and gets a gradient; elsewhere the gradient is exactly 0.
        base: V₀ strictly below the diagonal, s = ±1 on it, nothing read above, made by
            :func:`reflector_base`; shape, dtype and device of v. A constant.

    Returns:
        R, (…, r, D), dtype of v. ``orthonormalize(zeros_like(base), base)`` is the base point.

    Raises:
        TypeError: another dtype. Half precision cannot hold an orthonormal R: convert v first.
        ValueError: a wrong shape, or a base that does not match v or requires a gradient.
    """
    _check("v", v, "(…, D, r) with 1 ≤ r ≤ D", tall=True)
    if base is not None:
        _check_base(base, v)
    lead, (dim, rank) = v.shape[:-2], v.shape[-2:]
    shape = (math.prod(lead), dim, rank)
    v, base = v.reshape(shape), None if base is None else base.reshape(shape)
    rotation: Tensor
    # dispatch.within_transform, written out: every forward of a trained adapter comes here.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and not torch.compiler.is_compiling():
        rotation = _composed(v, base)
    elif v.device.type == "mps" and torch.is_autocast_enabled("mps"):
        with torch.autocast("mps", enabled=False):
            rotation = _Orthonormalize.apply(v, base)  # type: ignore[no-untyped-call]
    else:
        rotation = _Orthonormalize.apply(v, base)  # type: ignore[no-untyped-call]
    return rotation.reshape(*lead, rank, dim)


@torch.no_grad()
def reflector_base(rotation: Tensor) -> Tensor:
    """Compute the base point for which ``orthonormalize(zeros_like(base), base)`` is R.

    The reflectors are those of the QR factorisation of Rᵀ. The function runs once per adapter, so
    it may synchronise with the device.

    Args:
        rotation: R, (…, r, D) with 1 ≤ r ≤ D, float32 or float64, |R Rᵀ − I| at most
            ``ORTHONORMAL_WITHIN``, which is not checked on the meta device.

    Returns:
        base, (…, D, r), contiguous, dtype of R: reflectors strictly below the diagonal, signs ±1 on
        it, 0 above. The entries of reflectors are at most 1.

    Raises:
        TypeError: another dtype.
        ValueError: a wrong shape, rows that are not orthonormal.
    """
    _check("rotation", rotation, "(…, r, D) with 1 ≤ r ≤ D", tall=False)
    lead, (rank, dim) = rotation.shape[:-2], rotation.shape[-2:]
    if rotation.is_meta or rotation.numel() == 0:
        return rotation.new_empty(*lead, dim, rank)
    rows = rotation.reshape(-1, rank, dim).to(_compute_dtype(rotation))
    _check_orthonormal(rows)
    packed, _ = torch.geqrf(rows.mT)
    reflectors = _reflectors(packed, None)
    # Solvers disagree on whether to reflect a column that is already reduced; here it is reflected.
    # So the signs are read from the result: with V = 0 it is H(V₀) (−E) diag(s).
    signs = -(_forward(reflectors, rank, None)[0] * rows).sum(-1).sign()
    reflectors.diagonal(dim1=-2, dim2=-1).copy_(signs)
    return _columns(reflectors, rotation.dtype).reshape(*lead, dim, rank)


class _Orthonormalize(torch.autograd.Function):
    """:func:`orthonormalize` on checked (n, D, r) tensors, with the gradient derived above.

    Backward builds W again: only r × r matrices and the inputs are saved. If derivatives of the
    gradient may be requested, it computes everything again from the inputs.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, base: Tensor | None) -> Tensor:
        rotation, system, coeffs = _forward(_reflectors(v, base), v.shape[-1], base)
        ctx.save_for_backward(v, base, system, coeffs)
        return _cast(rotation, v.dtype)

    @staticmethod
    def backward(ctx: Any, d_rotation: Tensor) -> tuple[Tensor, None]:
        v, base, system, coeffs = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled()  # only under create_graph=True
            or within_transform()
            or is_batched(d_rotation)
        ):
            pullback = torch.func.vjp(lambda v: _composed(v, base), v)[1]
            return pullback(d_rotation)[0], None
        d_rotation = _cast(d_rotation, _compute_dtype(v))
        d_rows = _backward(d_rotation, _reflectors(v, base), system, coeffs, base)
        return _columns(d_rows, v.dtype), None


def _composed(v: Tensor, base: Tensor | None) -> Tensor:
    """Compute the forward of :class:`_Orthonormalize` operator by operator, for autograd."""
    return _cast(_forward(_reflectors(v, base), v.shape[-1], base)[0], v.dtype)


def _reflectors(v: Tensor, base: Tensor | None) -> Tensor:
    """Build Wᵀ = [V₀ V]ᵀ or Vᵀ, (n, k, D), a new float64 tensor: 1 on each diagonal, 0 below it."""
    blocks = (v,) if base is None else (base, v)
    batch, dim, rank = v.shape
    rows = v.new_empty((batch, rank * len(blocks), dim), dtype=_compute_dtype(v))
    for index, block in enumerate(blocks):  # no split: autograd allows no write into its parts
        target = rows.narrow(1, index * rank, rank)
        target.copy_(block.mT)
        target[..., :rank].triu_(1).diagonal(dim1=-2, dim2=-1).fill_(1)
    return rows


def _forward(rows: Tensor, rank: int, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute R (n, r, D), S (n, k, k) and P (n, k, r) from Wᵀ (n, k, D); k is r, or 2r with a
    base."""
    system = torch.bmm(rows, rows.mT).triu()
    system.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    top = _signed(rows[..., :rank], base)
    coeffs = torch.linalg.solve_triangular(system, top.neg(), upper=True)
    rotation = torch.bmm(coeffs.mT, rows)
    rotation.diagonal(dim1=-2, dim2=-1).add_(1 if base is None else _signs(base))
    return rotation, system, coeffs


def _backward(
    d_rotation: Tensor, rows: Tensor, system: Tensor, coeffs: Tensor, base: Tensor | None
) -> Tensor:
    """Compute dVᵀ (n, r, D) from dR (n, r, D), Wᵀ (n, k, D), S and P, all in float64."""
    rank = coeffs.shape[-1]
    d_coeffs = torch.bmm(d_rotation, rows.mT).mT
    solved = torch.linalg.solve_triangular(system.mT, d_coeffs, upper=False)
    d_gram = torch.bmm(solved, coeffs.mT).triu_().neg_()
    d_gram = d_gram + d_gram.triu(1).mT
    d_rows = torch.bmm(coeffs[:, -rank:], d_rotation).baddbmm_(d_gram[:, -rank:], rows)
    head = d_rows[..., :rank]
    head.sub_(_signed(solved[:, -rank:], base)).triu_(1)
    return d_rows


def _columns(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (n, D, r), contiguous, from (n, r, D): cast and transposed in one pass."""
    columns = rows.mT
    return rows.new_empty(columns.shape, dtype=dtype).copy_(columns)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without the call if the dtype is the same.

    The call would return the tensor itself. From a traced function that returns such an alias,
    torch 2.11 makes one whose gradient is 0.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _signs(base: Tensor) -> Tensor:
    return base.diagonal(dim1=-2, dim2=-1)


def _signed(columns: Tensor, base: Tensor | None) -> Tensor:
    """Multiply (n, k, r) by diag(s)."""
    return columns if base is None else columns * _signs(base).unsqueeze(-2)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the computation: float64, but the tensor's own on Apple's GPUs.

    They have no float64; :func:`orthonormalize` switches autocast off there.
    """
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


# ------------------------------------------------------------------- checks


def _check(name: str, tensor: Tensor, layout: str, *, tall: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32 or float64, got {tensor.dtype}; convert it first, "
            "orthonormal rows are exact in full precision only"
        )
    if tensor.ndim >= 2:
        dim, rank = (tensor if tall else tensor.mT).shape[-2:]
        if 1 <= rank <= dim:
            return
    raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")


def _check_base(base: Tensor, v: Tensor) -> None:
    if not isinstance(base, Tensor):
        raise TypeError(f"base must be a tensor or None, got {type(base).__name__}")
    for attribute in ("shape", "dtype", "device"):
        actual, expected = getattr(base, attribute), getattr(v, attribute)
        if actual != expected:
            raise ValueError(f"base must have the {attribute} of v, {expected}, got {actual}")
    if base.requires_grad:
        raise ValueError("base must not require a gradient, it is a constant: detach it")


def _check_orthonormal(rows: Tensor) -> None:
    """Check the rows of R (n, r, D)."""
    eye = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    error = float((torch.bmm(rows, rows.mT) - eye).abs().max())
    if not error <= ORTHONORMAL_WITHIN:
        raise ValueError(
            f"rotation must have orthonormal rows, max |R Rᵀ − I| at most {ORTHONORMAL_WITHIN}; "
            f"got {error:.3g}"
        )
