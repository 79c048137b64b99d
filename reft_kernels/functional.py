"""The public operator: check the arguments, choose a backend, run the edit."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels import autograd, reference
from reft_kernels.activations import ACTIVATIONS, activate
from reft_kernels.dispatch import Choice, choose, within_transform
from reft_kernels.rows import RowPlan
from reft_kernels.spec import EditWeights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lowrank_edit(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool = False,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """``h' = h + Rᵀ(act(W h + b) − σ R h)`` on the rows of ``plan``; other rows keep their bits.

    Equivalent to the following, for each group k and its rows i ≥ 0::

        out = hidden.clone().view(-1, D);  h = out[i].float()
        out[i] = (h + (act(h @ W[k].T + b[k]) - subtract * (h @ R[k].T)) @ R[k]).to(hidden.dtype)

    Args:
        hidden: (…, D), float32, bfloat16, float16 or float64. Not modified.
        plan: the rows, on the device of ``hidden``.
        encode: W, (r, D) or (g, r, D), or None for no learned projection.
        bias: b, (r,) or (g, r), or None for zero.
        decode: R, (r, D) or (g, r, D), 1 ≤ r ≤ D. All parameters have one dtype, float32 or that
            of hidden. For a plan with ``slots`` all three are tables of any number of entries.
        subtract: σ = 1.
        activation: a name of ``reft_kernels.activations.ACTIVATIONS``, or None for the identity.
        backend: "auto", "triton", "torch" or "reference"; a named backend runs or raises.

    Returns:
        A contiguous tensor like ``hidden``, rounded once from a float32 (or float64) sum.
        Differentiable in hidden, encode, bias and decode any number of times; under torch.compile
        once. Within transforms of torch.func (grad, jvp, vmap, …) and forward-mode differentiation
        the reference runs, and "triton" is refused.

    Raises:
        TypeError, ValueError: an argument is wrong. The message names it, its value and the
            allowed values; no tensor was changed.
    """
    weights = EditWeights(encode, bias, decode, subtract, activation)
    return apply_edit(hidden, plan, weights, backend=backend)


def lowrank_edit_(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool = False,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`lowrank_edit` in place: writes only the edited rows, returns ``hidden``.

    Raises:
        ValueError: also if ``hidden`` is (a view of) a leaf that requires grad while gradients are
            recorded, or overlaps itself in memory.
    """
    weights = EditWeights(encode, bias, decode, subtract, activation)
    return apply_edit(hidden, plan, weights, in_place=True, backend=backend)


def loreft(
    hidden: Tensor,
    plan: RowPlan,
    rotation: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """LoReFT, ``h' = h + Rᵀ(W h + b − R h)``, equation 2 of arXiv 2404.03592.

    ``rotation`` is R, (r, D) or (g, r, D). Its rows are used unchanged; see
    :func:`reft_kernels.orthonormalize`. The other arguments are those of :func:`lowrank_edit`.
    """
    return lowrank_edit(hidden, plan, weight, bias, rotation, subtract=True, backend=backend)


def loreft_(
    hidden: Tensor,
    plan: RowPlan,
    rotation: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """:func:`loreft` in place; see :func:`lowrank_edit_`."""
    return lowrank_edit_(hidden, plan, weight, bias, rotation, subtract=True, backend=backend)


def explain(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    *,
    subtract: bool = False,
    activation: str | None = None,
    backend: str = "auto",
) -> Choice:
    """Name the backend that :func:`lowrank_edit` uses for these arguments, without computing.

    Returns:
        (backend, reason), for example ``("torch", "hidden is on cpu; …")``.

    Raises:
        TypeError, ValueError: :func:`lowrank_edit` would raise the same.
    """
    weights = EditWeights(encode, bias, decode, subtract, activation)
    _check(hidden, plan, weights)
    return choose(backend, hidden, plan, weights)


def apply_edit(
    hidden: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    *,
    in_place: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Run :func:`lowrank_edit`, or with ``in_place`` :func:`lowrank_edit_`, on packed weights."""
    _check(hidden, plan, weights)
    if in_place:
        _check_in_place(hidden)
    backend = choose(backend, hidden, plan, weights).backend
    # Traced code consists of PyTorch's operators already, and the reference cannot be traced.
    if backend == "reference" or (within_transform() and not torch.compiler.is_compiling()):
        encode, bias, decode, subtract, activation = weights
        edited = reference.lowrank_edit(
            hidden, plan, encode, bias, decode, subtract=subtract, activation=activation
        )
        return hidden.copy_(edited) if in_place else edited
    if plan.num_rows == 0 or hidden.numel() == 0:
        # No kernel is launched, but every parameter needs a gradient, 0: in distributed training a
        # rank with an empty batch takes part in the reduction.
        plan = RowPlan(plan.rows[:0], (0,) * len(plan.offsets), max_row=-1, complete=True)
        backend = "torch"
    # Dynamo has no mark_dirty: a traced edit is made out of place and copied. The compiler turns
    # that into a write of the rows.
    copied = in_place and torch.compiler.is_compiling()
    edited = autograd.edit(hidden, plan, _computable(weights), backend, in_place and not copied)
    return hidden.copy_(edited) if copied else edited


def _computable(weights: EditWeights) -> EditWeights:
    """The equivalent weights that backends compute: no activation of a constant, no half
    precision."""
    encode, bias, decode, subtract, activation = weights
    if encode is None and activation is not None:
        # The activation's argument does not depend on h: act(b) is the bias of a linear edit.
        zero = decode.new_zeros(decode.shape[:-1])
        weights = EditWeights(
            None, activate(activation, zero if bias is None else bias), decode, subtract
        )
    if decode.dtype in (torch.float32, torch.float64):
        return weights
    # Rounded to half precision, W − R would lose most of what training changed.
    encode, bias, decode, subtract, activation = weights
    encode = None if encode is None else encode.float()
    bias = None if bias is None else bias.float()
    return EditWeights(encode, bias, decode.float(), subtract, activation)


def _check(hidden: Tensor, plan: RowPlan, weights: EditWeights) -> None:
    _check_types(hidden, plan, weights.decode)
    _check_shapes(hidden, plan, weights)
    activation = weights.activation
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be None or one of {known}; got {activation!r}")
    if weights.encode is None and weights.bias is None and not weights.subtract:
        raise ValueError(
            "encode and bias are both None and subtract is False: the edit would change nothing; "
            "pass encode or bias, or subtract=True"
        )
    _check_parameters(hidden, weights)
    if plan.device != hidden.device:
        raise ValueError(f"plan must be on hidden's device {hidden.device}, got {plan.device}")
    dim = hidden.shape[-1]
    if plan.max_row is not None and plan.max_row * dim >= hidden.numel():
        raise ValueError(
            f"plan names row {plan.max_row}, hidden has {hidden.numel() // dim} rows "
            f"(shape {tuple(hidden.shape)})"
        )


def _check_types(hidden: object, plan: object, decode: object) -> None:
    for name, value in (("hidden", hidden), ("decode", decode)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not isinstance(plan, RowPlan):
        raise TypeError(f"plan must be a RowPlan, got {type(plan).__name__}")
    assert isinstance(hidden, Tensor)
    if hidden.dtype not in _FLOATS:
        allowed = ", ".join(str(dtype) for dtype in _FLOATS)
        raise TypeError(f"hidden must have a dtype of {allowed}; got {hidden.dtype}")


def _check_shapes(hidden: Tensor, plan: RowPlan, weights: EditWeights) -> None:
    """Check hidden, decode and the number of groups."""
    decode = weights.decode
    if hidden.ndim < 1:
        raise ValueError("hidden must be (…, D), got a scalar")
    if decode.ndim not in (2, 3):
        raise ValueError(f"decode must be (r, D) or (g, r, D), got shape {tuple(decode.shape)}")
    rank, dim = decode.shape[-2:]
    if dim != hidden.shape[-1]:
        raise ValueError(
            f"decode must have D = {hidden.shape[-1]} columns as hidden has, "
            f"got shape {tuple(decode.shape)}"
        )
    if not 1 <= rank <= dim:
        raise ValueError(
            f"rank must lie in 1 … D = {dim}, got {rank} (decode {tuple(decode.shape)})"
        )
    if plan.slots is not None:
        _check_table(plan.slots, hidden, weights)
    elif (groups := decode.shape[0] if decode.ndim == 3 else 1) != plan.num_groups:
        raise ValueError(f"decode holds {groups} group(s), the plan has {plan.num_groups}")


def _check_table(slots: Tensor, hidden: Tensor, weights: EditWeights) -> None:
    encode, bias, decode = weights[:3]
    if decode.ndim != 3:
        raise ValueError(
            f"decode must be (entries, r, D) for a plan with slots, got {tuple(decode.shape)}"
        )
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, encode, bias, decode)
    ):
        raise ValueError(
            "hidden and parameters must not require grad for a plan with slots: a table of "
            "adapters is for inference; train with one entry a group"
        )
    if slots.device.type == "cpu" and not torch.compiler.is_compiling() and slots.numel():
        low, high = int(slots.min()), int(slots.max())
        if low < -1 or high >= decode.shape[0]:
            raise ValueError(
                f"slots must lie in −1 … {decode.shape[0] - 1}, the entries of decode; got "
                f"{low if low < -1 else high}"
            )


def _check_parameters(hidden: Tensor, weights: EditWeights) -> None:
    """Check shape, dtype and device of each parameter against decode and hidden."""
    encode, bias, decode = weights[:3]
    matrix, dtype, device = decode.shape, decode.dtype, hidden.device
    allowed = dtype is torch.float32 or dtype == hidden.dtype
    for name, value, shape in (
        ("encode", encode, matrix),
        ("bias", bias, matrix[:-1]),
        ("decode", decode, matrix),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} to match decode, got {tuple(value.shape)}"
            )
        if not allowed or value.dtype != dtype:
            raise TypeError(
                f"{name} must be float32 or hidden's {hidden.dtype}, one dtype for all parameters; "
                f"got {value.dtype} (decode {dtype})"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on hidden's device {device}, got {value.device}")


def _check_in_place(hidden: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        base = hidden._base if hidden._is_view() else hidden
        if base is not None and base.is_leaf and base.requires_grad:
            raise ValueError(
                f"hidden (shape {tuple(hidden.shape)}) is (a view of) a leaf that requires grad: "
                "edit it out of place with lowrank_edit, or under torch.no_grad()"
            )
    strides = hidden.stride()
    if 0 in strides and any(
        stride == 0 and size > 1 for size, stride in zip(hidden.shape, strides, strict=True)
    ):
        raise ValueError(
            f"hidden overlaps itself in memory (strides {strides}): make it contiguous"
        )
