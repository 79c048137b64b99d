"""The public door: check, choose a backend, run. Users, tests and benchmarks all enter here."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels import autograd, reference, transforms
from reft_kernels.activations import ACTIVATIONS, activate
from reft_kernels.dispatch import Choice, choose
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
    """``h' = h + Rᵀ(act(W h + b) − σ R h)`` on the rows of ``plan``; other rows stay bit for bit.

    The same as, for each group k and its rows i ≥ 0::

        out = hidden.clone().view(-1, D);  h = out[i].float()
        out[i] = (h + (act(h @ W[k].T + b[k]) - subtract * (h @ R[k].T)) @ R[k]).to(hidden.dtype)

    Args:
        hidden: (…, D), float32, bfloat16, float16 or float64. Not modified.
        plan: the rows, on the device of ``hidden``.
        encode: W, (r, D) or (g, r, D), or None where nothing is projected.
        bias: b, (r,) or (g, r), or None for zero.
        decode: R, (r, D) or (g, r, D), 1 ≤ r ≤ D. Parameters share one dtype, float32 or hidden's
            own. For a plan with ``slots`` all three are tables of any number of entries.
        subtract: σ = 1.
        activation: a name of ``reft_kernels.activations.ACTIVATIONS``, or None for the identity.
        backend: "auto", "triton", "torch" or "reference"; a named one works or raises.

    Returns:
        A contiguous tensor like ``hidden``, rounded once from a float32 (or float64) sum.
        Differentiable in hidden, encode, bias and decode any number of times; under torch.compile
        once. Within transforms of torch.func (grad, jvp, vmap, …) and forward-mode differentiation
        the reference runs, and "triton" is refused.

    Raises:
        TypeError, ValueError: what was wrong, which value, and what is allowed; nothing was
            changed.
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
    """LoReFT, ``h' = h + Rᵀ(W h + b − R h)`` (arXiv 2404.03592, eq. 2): rotation is R, (r, D) or
    (g, r, D),
    its rows taken as they are (see :func:`reft_kernels.orthonormalize`). Otherwise
    :func:`lowrank_edit`."""
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
    """Which backend :func:`lowrank_edit` takes for these arguments, and why; computes nothing.

    Returns:
        (backend, reason), for example ``("torch", "hidden is on cpu; …")``.

    Raises:
        TypeError, ValueError: as :func:`lowrank_edit` would.
    """
    _check(hidden, plan, encode, bias, decode, subtract, activation)
    return choose(backend, hidden, decode, activation, plan.num_groups)


def apply_edit(
    hidden: Tensor,
    plan: RowPlan,
    weights: EditWeights,
    *,
    in_place: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`lowrank_edit`, or with ``in_place`` :func:`lowrank_edit_`, of packed weights."""
    encode, bias, decode, subtract, activation = weights
    _check(hidden, plan, encode, bias, decode, subtract, activation)
    if in_place:
        _check_inplace(hidden)
    choice = choose(backend, hidden, decode, activation, plan.num_groups).backend
    # What is traced is PyTorch's own already, and the reference could not be traced.
    looked_through = transforms.active() and not torch.compiler.is_compiling()
    if choice == "reference" or looked_through:
        edited = reference.lowrank_edit(
            hidden, plan, encode, bias, decode, subtract=subtract, activation=activation
        )
        return hidden.copy_(edited) if in_place else edited
    if plan.num_rows == 0 or hidden.numel() == 0:
        # Nothing to launch, and yet every parameter has a gradient, 0: a rank of a distributed run
        # whose batch is empty takes part in the reduction.
        plan = RowPlan(plan.rows[:0], (0,) * len(plan.offsets), max_row=-1, complete=True)
        choice = "torch"
    if encode is None and activation is not None:
        # Nothing of h is inside the activation: act(b) is the constant of an edit without one.
        zero = decode.new_zeros(decode.shape[:-1])
        bias, activation = activate(activation, zero if bias is None else bias), None
    if decode.dtype not in (torch.float32, torch.float64):
        # Rounded to half precision, W − R would lose most of what training moved.
        encode = None if encode is None else encode.float()
        bias = None if bias is None else bias.float()
        decode = decode.float()
    # Dynamo has no mark_dirty: traced, the edit is made apart and copied, which the compiler turns
    # back into a write of the rows.
    traced = in_place and torch.compiler.is_compiling()
    edited = autograd.apply_edit(
        hidden,
        plan,
        encode,
        bias,
        decode,
        subtract=subtract,
        activation=activation,
        backend=choice,
        inplace=in_place and not traced,
    )
    return hidden.copy_(edited) if traced else edited


def _check(
    hidden: Tensor,
    plan: RowPlan,
    encode: Tensor | None,
    bias: Tensor | None,
    decode: Tensor,
    subtract: bool,
    activation: str | None,
) -> None:
    for name, given in (("hidden", hidden), ("decode", decode)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if not isinstance(plan, RowPlan):
        raise TypeError(f"plan must be a RowPlan, got {type(plan).__name__}")
    if hidden.dtype not in _FLOATS:
        allowed = ", ".join(str(dtype) for dtype in _FLOATS)
        raise TypeError(f"hidden must have a dtype of {allowed}; got {hidden.dtype}")
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
        _check_table(plan.slots, hidden, encode, bias, decode)
    elif (groups := decode.shape[0] if decode.ndim == 3 else 1) != plan.num_groups:
        raise ValueError(f"decode holds {groups} group(s), the plan has {plan.num_groups}")
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be None or one of {known}; got {activation!r}")
    if encode is None and bias is None and not subtract:
        raise ValueError("encode and bias are both None and subtract is False: there is no edit")
    for name, value, shape in (
        ("encode", encode, decode.shape),
        ("bias", bias, decode.shape[:-1]),
        ("decode", decode, decode.shape),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} to match decode, got {tuple(value.shape)}"
            )
        if value.dtype != decode.dtype or value.dtype not in (torch.float32, hidden.dtype):
            raise TypeError(
                f"{name} must be float32 or hidden's {hidden.dtype}, one dtype for all parameters; "
                f"got {value.dtype} (decode {decode.dtype})"
            )
        if value.device != hidden.device:
            raise ValueError(
                f"{name} must be on hidden's device {hidden.device}, got {value.device}"
            )
    if plan.device != hidden.device:
        raise ValueError(f"plan must be on hidden's device {hidden.device}, got {plan.device}")
    if plan.max_row is not None and plan.max_row * dim >= hidden.numel():
        raise ValueError(
            f"plan names row {plan.max_row}, hidden has {hidden.numel() // dim} rows "
            f"(shape {tuple(hidden.shape)})"
        )


def _check_table(
    slots: Tensor, hidden: Tensor, encode: Tensor | None, bias: Tensor | None, decode: Tensor
) -> None:
    if decode.ndim != 3:
        raise ValueError(
            f"decode must be (entries, r, D) for a plan with slots, got {tuple(decode.shape)}"
        )
    if torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (hidden, encode, bias, decode)
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


def _check_inplace(hidden: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        base = hidden._base if hidden._is_view() else hidden
        if base is not None and base.is_leaf and base.requires_grad:
            raise ValueError(
                f"hidden (shape {tuple(hidden.shape)}) is (a view of) a leaf that requires grad: "
                "edit it out of place with lowrank_edit, or under torch.no_grad()"
            )
    if any(
        stride == 0 and size > 1 for size, stride in zip(hidden.shape, hidden.stride(), strict=True)
    ):
        raise ValueError(
            f"hidden overlaps itself in memory (strides {hidden.stride()}): make it contiguous"
        )
