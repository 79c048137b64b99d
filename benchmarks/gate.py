"""The check before a measurement: the same shape is compared with float64 before it is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, OpCase
from benchmarks.result_rows import Gate
from reft_kernels.devtools.testing import Edit, Result, budget, relative_error

#: Largest relative error of another library, by dtype of hidden: its order of roundings differs.
PEER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: Largest relative error of a whole model's loss.
LOSS_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class OpGate:
    """Checks the output and the gradients that a peer computes in a case.

    Args:
        edit: the tensors of the case.
    """

    def __init__(self, case: OpCase, edit: Edit) -> None:
        self.case, self.edit = case, edit
        self._budget = budget(edit)

    def check(self, result: Result, *, within_budget: bool) -> Gate:
        """Compare with float64.

        Args:
            within_budget: apply the error budget of the test suite, instead of
                :data:`PEER_TOLERANCE`.
        """
        if within_budget:
            try:
                self._budget.check(result)
            except AssertionError as error:
                return Gate(False, str(error))
            return Gate(True, "within the error budget of the tests")
        exact, allowed = self._budget.exact, PEER_TOLERANCE[DTYPES[self.case.dtype]]
        pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
            "out": (result.out, exact.out),
            **{name: (result.grads.get(name), exact.grads[name]) for name in exact.grads},
        }
        errors = {
            name: relative_error(computed, expected)[0]
            for name, (computed, expected) in pairs.items()
            if computed is not None and expected is not None
        }
        says = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        return Gate(max(errors.values()) <= allowed, f"{says}; allowed {allowed:.0e}")


def check_losses(loss: float, expected: float, dtype: torch.dtype) -> Gate:
    """Compare the loss of a wrapped model with that of the reference."""
    error, allowed = abs(loss - expected) / max(abs(expected), 1e-9), LOSS_TOLERANCE[dtype]
    return Gate(error <= allowed, f"loss off by {error:.1e}, allowed {allowed:.0e}")


def result_of(out: Tensor, grads: Mapping[str, Tensor]) -> Result:
    """Rename the gradients of a peer to the operator's arguments.

    A gradient whose name ends in ".T" is transposed; names that the operator does not have are left
    out.
    """
    canonical: dict[str, Tensor | None] = dict.fromkeys(("hidden", "encode", "bias", "decode"))
    for name, grad in grads.items():
        plain = name.removesuffix(".T")
        if plain in canonical:
            canonical[plain] = grad.mT if name.endswith(".T") else grad
    return Result(out.detach(), canonical)
