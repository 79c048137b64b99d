"""Shared parts of tests and benchmarks: cases, error budgets, poisoned memory, counts of paths.

A :class:`Case` describes a shape, :func:`make_edit` makes its tensors, :func:`run_edit` runs one
forward and backward, and a :class:`Budget` limits the distance of the result from float64. Tests
and the gate of every benchmark judge with the same functions, on every device.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from reft_kernels.reference import lowrank_edit as _reference
from reft_kernels.rows import RowPlan
from reft_kernels.spec import FAMILY
from reft_kernels.torch_backend import compute_dtype

#: Allowed error against float64, as a multiple of the error of eager PyTorch in the same dtypes.
FACTOR = 2.0
#: Allowed in addition: one rounding (half a step) to the coarser of hidden's and the tensor's own
#: dtype, and this number of steps of the dtype of the sums. Eager PyTorch may by chance be exact
#: for a few numbers.
STEPS = 4.0

PARAMETERS = ("encode", "bias", "decode")
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True, slots=True)
class Case:
    """One edit, by its shape.

    Attributes:
        dim, rank: D and r.
        groups: number of rows of each group, −1 included.
        missing: which rows are −1: "none", "some" (every third) or "all".
        member: name of a row of ``FAMILY``.
        activation: its name or None.
        dtype: dtype of hidden.
        parameters: dtype of encode, bias and decode. None: float64 if hidden is float64, else
            float32.
        layout: memory layout of hidden. "contiguous", "sliced" (columns of a wider tensor) and
            "transposed" are (N, D); "swapped" is (B, S, D), whose rows have no common stride.
        biased: whether there is a bias, which some members need not have.
        extra: number of rows of hidden outside the plan.
        seed: seed of the random numbers.
    """

    dim: int
    rank: int
    groups: tuple[int, ...] = (7,)
    missing: str = "none"
    member: str = "loreft"
    activation: str | None = None
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = None
    layout: str = "contiguous"
    biased: bool = True
    extra: int = 6
    seed: int = 0

    def __str__(self) -> str:
        """A readable id: shape and dtype, and the fields that differ from their defaults."""
        parts = [
            self.member,
            f"D{self.dim}",
            f"r{self.rank}",
            _groups_id(self.groups),
            _short(self.dtype),
        ]
        if self.parameters is not None:
            parts.append(f"params-{_short(self.parameters)}")
        if self.activation is not None:
            parts.append(self.activation)
        if self.missing != "none":
            parts.append(f"missing-{self.missing}")
        if self.layout != "contiguous":
            parts.append(self.layout)
        if not self.biased:
            parts.append("unbiased")
        return "-".join(parts)


@dataclass(frozen=True, slots=True)
class Edit:
    """The tensors of a case, contiguous: :func:`run_edit` applies ``layout``.

    Attributes:
        hidden: (N, D), or (B, S, D) for "swapped".
        upstream: the gradient of the output, of the same shape.
        options: subtract and activation.
    """

    hidden: Tensor
    plan: RowPlan
    encode: Tensor | None
    bias: Tensor | None
    decode: Tensor
    upstream: Tensor
    options: dict[str, Any]
    layout: str = "contiguous"

    def cast(self, dtype: torch.dtype) -> Edit:
        """Return an edit with every float tensor converted to ``dtype``."""
        names = ("hidden", *PARAMETERS, "upstream")
        tensors: dict[str, Any] = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {k: v if v is None else v.to(dtype) for k, v in tensors.items()}
        return replace(self, **changed)

    @property
    def live(self) -> Tensor:
        """The edited rows, in ascending order."""
        return self.plan.rows[self.plan.rows >= 0].sort().values

    @property
    def unnamed(self) -> Tensor:
        """The rows outside the plan."""
        count = self.hidden.numel() // self.hidden.shape[-1]
        mask = torch.ones(count, dtype=torch.bool, device=self.hidden.device)
        return mask.index_fill_(0, self.live, False).nonzero().flatten()


@dataclass(frozen=True, slots=True)
class Result:
    """An output and its gradients by argument name, None for those that were not requested."""

    out: Tensor
    grads: dict[str, Tensor | None]


def make_edit(case: Case, device: torch.device | str = "cpu") -> Edit:
    """Make random tensors for a case, scaled so that every term of the edit affects the output."""
    random = torch.Generator().manual_seed(case.seed)
    spec, (g, n) = FAMILY[case.member], (len(case.groups), sum(case.groups))
    dim, rank, total = case.dim, case.rank, n + case.extra
    dtype = case.dtype
    params = case.parameters or (torch.float64 if dtype is torch.float64 else torch.float32)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = params) -> Tensor:
        values = torch.randn(*shape, generator=random, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    rows = torch.randperm(total, generator=random)[:n]
    if case.missing != "none":
        rows[:: 3 if case.missing == "some" else 1] = -1
    sizes = torch.tensor(case.groups, dtype=torch.int64)
    groups = torch.repeat_interleave(torch.arange(g), sizes)
    plan = RowPlan.from_rows(rows, groups, g).to(device)
    stack = (g,) if g > 1 else ()
    shape = (2, -(-total // 2), dim) if case.layout == "swapped" else (total, dim)
    return Edit(
        hidden=normal(*shape, dtype=dtype),
        plan=plan,
        encode=normal(*stack, rank, dim, scale=dim**-0.5) if spec.has_encode else None,
        bias=normal(*stack, rank) if case.biased else None,
        # The norm of R h, and of Rᵀ R h, is (D / r)^¼ times that of h: both terms count.
        decode=normal(*stack, rank, dim, scale=(dim * rank) ** -0.25),
        upstream=normal(*shape, dtype=dtype),
        options={"subtract": spec.subtract, "activation": case.activation},
        layout=case.layout,
    )


def run_edit(
    function: Callable[..., Tensor],
    edit: Edit,
    *,
    wants: tuple[str, ...] = ("hidden", *PARAMETERS),
    **options: Any,
) -> Result:
    """Run forward and backward of ``function`` (``lowrank_edit`` or ``lowrank_edit_``).

    Args:
        wants: arguments that require a gradient.
        options: further arguments, for example the backend.

    Returns:
        The output and the gradients, detached.
    """
    leaves: dict[str, Any] = {}
    for name in ("hidden", *PARAMETERS):
        value = getattr(edit, name)
        leaves[name] = None if value is None else value.clone().requires_grad_(name in wants)
    hidden = laid_out(leaves["hidden"], edit.layout)
    parameters = (leaves[name] for name in PARAMETERS)
    out = function(hidden, edit.plan, *parameters, **edit.options, **options)
    inputs = {name: leaves[name] for name in wants if leaves[name] is not None}
    grads: dict[str, Tensor | None] = dict.fromkeys(leaves)
    if inputs:
        values = torch.autograd.grad(out, list(inputs.values()), edit.upstream)
        grads |= zip(inputs, values, strict=True)
    return Result(out.detach(), grads)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Copy ``values`` into another memory layout, differentiably."""
    if layout == "sliced":
        return torch.nn.functional.pad(values, (3, 4), value=float("nan"))[..., 3:-4]
    if layout == "transposed":
        return values.T.clone(memory_format=torch.contiguous_format).T
    if layout == "swapped":
        return values.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    return values.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Budget:
    """The allowed distance of each tensor of an edit from float64.

    Attributes:
        exact: the result of the reference in float64.
        allowed: name ("out" or an argument) -> (relative Frobenius, relative maximum) error.
    """

    edit: Edit
    exact: Result
    allowed: dict[str, tuple[float, float]]

    def check(self, result: Result) -> None:
        """Compare a result; rows outside the plan must agree bit for bit.

        Raises:
            AssertionError: names the tensor, its error and the allowed error.
        """
        edit = self.edit
        dim = self.exact.out.shape[-1]
        for name, actual, source in (
            ("out", result.out, edit.hidden),
            ("hidden", result.grads["hidden"], edit.upstream),
        ):
            if actual is not None:
                rows = (tensor.reshape(-1, dim)[edit.unnamed] for tensor in (actual, source))
                assert same_bits(*rows), f"{name}: a row outside the plan changed"
        for name, exact in _compared(edit, self.exact).items():
            actual = _compared(edit, result)[name]
            if actual is None:
                continue
            assert exact is not None
            assert actual.dtype == _dtype_of(edit, name), f"{name} has dtype {actual.dtype}"
            error, allowed = relative_error(actual, exact), self.allowed[name]
            assert error[0] <= allowed[0] and error[1] <= allowed[1], (
                f"{name}: error (norm, max) {error[0]:.3g}, {error[1]:.3g} against float64, "
                f"allowed {allowed[0]:.3g}, {allowed[1]:.3g}"
            )


def budget(edit: Edit) -> Budget:
    """Compute the budget of an edit: ``FACTOR`` times the error of the reference in the edit's own
    dtypes, plus a few rounding steps.

    The budget of float64 is that of float32, scaled down by the ratio of their steps.
    """
    exact = run_edit(_reference, edit.cast(torch.float64))
    if edit.hidden.dtype is torch.float64:
        single = edit.cast(torch.float32)
        judged, eager = (
            run_edit(_reference, single.cast(torch.float64)),
            run_edit(_reference, single),
        )
        scale = _step(torch.float64) / _step(torch.float32)
    else:
        judged, eager, scale = exact, run_edit(_reference, edit), 1.0
    expected, actual = _compared(edit, judged), _compared(edit, eager)
    allowed = {}
    for name, value in expected.items():
        other = actual[name]
        if value is not None and other is not None:
            storage = max(_step(edit.hidden.dtype), _step(_dtype_of(edit, name)))
            steps = storage / 2 + STEPS * _step(compute_dtype(edit.hidden, edit.decode))
            rms, peak = relative_error(other, value)
            allowed[name] = (FACTOR * scale * rms + steps, FACTOR * scale * peak + steps)
    return Budget(edit, exact, allowed)


def relative_error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Compute ‖actual − exact‖/‖exact‖ and max|actual − exact|/max|exact|.

    Both are infinite for NaN, and if exact is 0 but actual is not.
    """
    if exact.numel() == 0:
        return 0.0, 0.0
    difference, size = actual.double() - exact.double(), exact.double()
    pairs = ((difference.norm(), size.norm()), (difference.abs().max(), size.abs().max()))
    errors = [0.0 if float(error) == 0 else float(error / norm) for error, norm in pairs]
    rms, peak = (float("inf") if math.isnan(error) else error for error in errors)
    return rms, peak


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN and −0 included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def _compared(edit: Edit, result: Result) -> dict[str, Tensor | None]:
    """Return the edited rows of the output and of dh, and all of the other gradients."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])[edit.live]

    grads = result.grads
    return {"out": rows(result.out), **grads, "hidden": rows(grads["hidden"])}


def _dtype_of(edit: Edit, name: str) -> torch.dtype:
    return (edit.hidden if name in ("out", "hidden") else edit.decode).dtype


def _step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@contextmanager
def poisoned_memory(package: str = "reft_kernels") -> Iterator[None]:
    """Fill uninitialised memory that ``package`` allocates with NaN (integers: their smallest
    value), so that elements which no kernel writes are noticed."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == package and caller != __name__:
                has_nan = tensor.is_floating_point() or tensor.is_complex()
                tensor.fill_(float("nan") if has_nan else torch.iinfo(tensor.dtype).min)
            return tensor

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


@contextmanager
def count_paths() -> Iterator[Counter[str]]:
    """Count the calls by path: "triton.<kernel>" per launch, "torch.edit_forward",
    "torch.edit_backward", "reference.lowrank_edit". The part before the dot is the backend."""
    from reft_kernels import _triton, reference, torch_backend

    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    patches: list[Any] = [
        mock.patch.object(module, name, counted(f"{label}.{name}", getattr(module, name)))
        for label, module, name in (
            ("torch", torch_backend, "edit_forward"),
            ("torch", torch_backend, "edit_backward"),
            ("reference", reference, "lowrank_edit"),
        )
    ]
    if _triton.why_not("cuda") is None:
        from reft_kernels._triton import launch

        patches += [
            mock.patch.object(launch, name, _CountedKernel(kernel, f"triton.{name}", counts))
            for name, kernel in vars(launch).items()
            if name.endswith("_kernel")
        ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield counts


class _CountedKernel:
    """A kernel that counts each ``kernel[grid](…)``."""

    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def __getitem__(self, grid: Any) -> Any:
        self._counts[self._name] += 1
        return self._kernel[grid]


def _groups_id(groups: tuple[int, ...]) -> str:
    if len(groups) > 6:
        return f"{len(groups)}groups-n{sum(groups)}"
    return "n" + "+".join(map(str, groups))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
