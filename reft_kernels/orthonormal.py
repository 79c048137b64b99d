"""R with orthonormal rows from a free parameter V: r Householder reflectors in compact WY form.

A unit lower trapezoidal V (D, r), columns v_j, stands for H(V) = H₁ ⋯ H_r, H_j = I − τ_j v_j v_jᵀ,
τ_j = 2/‖v_j‖². E is the first r columns of I_D. Then

    H(V) E = E − V T V_topᵀ,    T⁻¹ = strict_upper(VᵀV) + diag(1/τ),

V_top being the first r rows. That is O(D r²) work on O(D r) memory: nothing is ever D × D. Around a
base point, itself r reflectors V₀ and r signs s,

    Rᵀ = Q = H(V₀) H(V) E diag(s).

H(V₀) H(V) = H([V₀ V]) is one product of 2r reflectors, so that with W = [V₀ V], or W = V without a
base, one formula and one gradient serve both:

    S = strict_upper(WᵀW) + ½ diag(WᵀW),    P = −S⁻¹ W_topᵀ diag(s),    Q = E diag(s) + W P.

Backward, from dQ:

    dP = Wᵀ dQ,    Y = S⁻ᵀ dP,    M = upper(−Y Pᵀ) with its diagonal once,
    dW = dQ Pᵀ + W (strict_upper(M) + Mᵀ),    dW_top −= diag(s) Yᵀ,

of which the V half is kept, strictly below the diagonal.

Why this map. It has no bad point: the diagonal of V is 1 by definition, so ‖v_j‖ ≥ 1, S is
invertible, and |P| ≤ 2 whatever V is; weight decay takes V to 0, that is R to the base point, never
to a matrix of lower rank. Zero V is the start of training, and there the coordinates are those of
``torch.nn.utils.parametrizations.orthogonal(…, orthogonal_map="householder")``: let
S₀ = diag(−s, 1, …, 1) (D × D). torch's V for the D × D base H(V₀) S₀ is S₀ V diag(−s), which gives
the same R. Coordinates differ by signs only, and neither SGD nor Adam can tell.

Precision. Everything between input and output is float64, so that a float32 R is the float64 one,
rounded once, and |R Rᵀ − I| is at most the rounding unit 1.2e-7 (measured at D ≥ 768: 8e-9). In
float32, adding D small squares to the 1 on the diagonal already costs 5e-6 (D 768, r 32), and the
process may allow TF32, or autocast bfloat16, in float32 products; float64 is out of their reach.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reft_kernels import transforms

#: Largest |R Rᵀ − I| that :func:`reflector_base` takes for the rounding of an orthonormal R, be it
#: one stored in bfloat16. Its result is exactly orthonormal and that near to what was given.
ORTHONORMAL_WITHIN = 0.1

_DTYPES = (torch.float32, torch.float64)


def orthonormalize(v: Tensor, base: Tensor | None = None) -> Tensor:
    """R = (H(V₀) H(V) E diag(s))ᵀ, orthonormal rows for any finite V; differentiable in v.

    Without a base R = (H(V) E)ᵀ, the transpose of ``torch.linalg.householder_product`` of V and τ.
    Differentiable any number of times and within transforms of torch.func; under torch.compile
    once.
    Every batch entry is its own problem. No host synchronisation; autocast does not reach inside.

    Args:
        v: (…, D, r) with 1 ≤ r ≤ D, float32 or float64, any strides. Only its strictly lower
            trapezoid is read, and only that gets a gradient; elsewhere the gradient is exactly 0.
        base: V₀ strictly below the diagonal, s = ±1 on it, nothing read above, as
            :func:`reflector_base` makes it; shape, dtype and device of v. A constant.

    Returns:
        R, (…, r, D), dtype of v. ``orthonormalize(zeros_like(base), base)`` is the base point.

    Raises:
        TypeError: another dtype. Half precision cannot hold an orthonormal R: convert v first.
        ValueError: a wrong shape, a base that does not go with v or requires a gradient.
    """
    _check("v", v, "(…, D, r) with 1 ≤ r ≤ D", tall=True)
    if base is not None:
        _check_base(base, v)
    lead, (dim, rank) = v.shape[:-2], v.shape[-2:]
    shape = (math.prod(lead), dim, rank)
    v, base = v.reshape(shape), None if base is None else base.reshape(shape)
    rotation: Tensor
    if transforms.active() and not torch.compiler.is_compiling():
        rotation = _composed(v, base)
    else:
        rotation = _Orthonormalize.apply(v, base)  # type: ignore[no-untyped-call]
    return rotation.reshape(*lead, rank, dim)


@torch.no_grad()
def reflector_base(rotation: Tensor) -> Tensor:
    """The base point for an orthonormal R: ``orthonormalize(zeros_like(base), base)`` is R again.

    The reflectors are those of the QR factorisation of Rᵀ. Made once, so it may read the device.

    Args:
        rotation: R, (…, r, D) with 1 ≤ r ≤ D, float32 or float64, |R Rᵀ − I| at most
            ``ORTHONORMAL_WITHIN``, which is not looked at on the meta device.

    Returns:
        base, (…, D, r), contiguous, dtype of R: reflectors strictly below the diagonal, signs ±1 on
        it, 0 above. Their entries are at most 1.

    Raises:
        TypeError: another dtype.
        ValueError: a wrong shape, rows that are not orthonormal.
    """
    _check("rotation", rotation, "(…, r, D) with 1 ≤ r ≤ D", tall=False)
    lead, (rank, dim) = rotation.shape[:-2], rotation.shape[-2:]
    if rotation.is_meta or rotation.numel() == 0:
        return rotation.new_empty(*lead, dim, rank)
    given = rotation.reshape(-1, rank, dim).to(_wide(rotation))
    _check_orthonormal(given)
    packed, _ = torch.geqrf(given.mT)
    reflectors = _reflectors(packed, None)
    # Solvers disagree on whether a column that is already reduced is reflected; here it is. So
    # the signs are read off the result: with V = 0 it is H(V₀) (−E) diag(s).
    signs = -(_forward(reflectors, rank, None)[0] * given).sum(-1).sign()
    reflectors.diagonal(dim1=-2, dim2=-1).copy_(signs)
    return _columns(reflectors, rotation.dtype).reshape(*lead, dim, rank)


class _Orthonormalize(torch.autograd.Function):
    """:func:`orthonormalize` on checked (n, D, r) tensors, with the gradient written out above.

    W is made again in backward: what is kept between the two is r × r, and the inputs. Of inputs
    everything is made again where derivatives of the gradient may be asked for.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, base: Tensor | None) -> Tensor:
        rotation, system, codes = _forward(_reflectors(v, base), v.shape[-1], base)
        ctx.save_for_backward(v, base, system, codes)
        return _cast(rotation, v.dtype)

    @staticmethod
    def backward(ctx: Any, d_rotation: Tensor) -> tuple[Tensor, None]:
        v, base, system, codes = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled()  # under create_graph=True, and only there
            or transforms.active()
            or transforms.batched(d_rotation)
        ):
            pullback = torch.func.vjp(lambda v: _composed(v, base), v)[1]
            return pullback(d_rotation)[0], None
        d_rows = _backward(_cast(d_rotation, _wide(v)), _reflectors(v, base), system, codes, base)
        return _columns(d_rows, v.dtype), None


def _composed(v: Tensor, base: Tensor | None) -> Tensor:
    """The forward of :class:`_Orthonormalize` as autograd sees it, operator by operator."""
    return _cast(_forward(_reflectors(v, base), v.shape[-1], base)[0], v.dtype)


def _reflectors(v: Tensor, base: Tensor | None) -> Tensor:
    """Wᵀ = [V₀ V]ᵀ or Vᵀ, (n, k, D), a new wide tensor: 1 on each diagonal, 0 below it."""
    blocks = (v,) if base is None else (base, v)
    batch, dim, rank = v.shape
    rows = v.new_empty((batch, rank * len(blocks), dim), dtype=_wide(v))
    for index, block in enumerate(blocks):  # not of one split: autograd lets no part be written
        target = rows.narrow(1, index * rank, rank)
        target.copy_(block.mT)
        target[..., :rank].triu_(1).diagonal(dim1=-2, dim2=-1).fill_(1)
    return rows


def _forward(rows: Tensor, rank: int, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """R (n, r, D), S (n, k, k) and P (n, k, r) from Wᵀ (n, k, D), k being r, or 2r with a base."""
    system = torch.bmm(rows, rows.mT).triu()
    system.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    top = _signed(rows[..., :rank], base)
    codes = torch.linalg.solve_triangular(system, top.neg(), upper=True)
    rotation = torch.bmm(codes.mT, rows)
    rotation.diagonal(dim1=-2, dim2=-1).add_(1 if base is None else _signs(base))
    return rotation, system, codes


def _backward(
    d_rotation: Tensor, rows: Tensor, system: Tensor, codes: Tensor, base: Tensor | None
) -> Tensor:
    """dVᵀ (n, r, D) from dR (n, r, D), Wᵀ (n, k, D), S and P; everything wide."""
    rank = codes.shape[-1]
    d_codes = torch.bmm(d_rotation, rows.mT).mT
    solved = torch.linalg.solve_triangular(system.mT, d_codes, upper=False)
    d_gram = torch.bmm(solved, codes.mT).triu_().neg_()
    d_gram = d_gram + d_gram.triu(1).mT
    d_rows = torch.bmm(codes[:, -rank:], d_rotation).baddbmm_(d_gram[:, -rank:], rows)
    head = d_rows[..., :rank]
    head.sub_(_signed(solved[:, -rank:], base)).triu_(1)
    return d_rows


def _columns(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, D, r), contiguous, from (n, r, D): cast and transposed in one pass."""
    columns = rows.mT
    return rows.new_empty(columns.shape, dtype=dtype).copy_(columns)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, but not called where it would return the tensor itself: of a traced
    function that returns such an alias torch 2.11 makes one whose gradient is 0."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _signs(base: Tensor) -> Tensor:
    return base.diagonal(dim1=-2, dim2=-1)


def _signed(columns: Tensor, base: Tensor | None) -> Tensor:
    """(n, k, r) times diag(s)."""
    return columns if base is None else columns * _signs(base).unsqueeze(-2)


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in between; Apple's GPUs have no float64, and there callers keep autocast away."""
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
    for what in ("shape", "dtype", "device"):
        theirs, ours = getattr(base, what), getattr(v, what)
        if theirs != ours:
            raise ValueError(f"base must have the {what} of v, {ours}, got {theirs}")
    if base.requires_grad:
        raise ValueError("base must not require a gradient, it is a constant: detach it")


def _check_orthonormal(rows: Tensor) -> None:
    """Rows (n, r, D)."""
    eye = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    error = float((torch.bmm(rows, rows.mT) - eye).abs().max())
    if not error <= ORTHONORMAL_WITHIN:
        raise ValueError(
            f"rotation must have orthonormal rows, max |R Rᵀ − I| at most {ORTHONORMAL_WITHIN}; "
            f"got {error:.3g}"
        )
