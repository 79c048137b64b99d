"""No number without its check: the same shape is compared with float64 before it is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, OpCase
from benchmarks.result_rows import Gate
from reft_kernels.testing import Edit, Result, budget, relative_error

#: How far another library's own order of roundings may lie from float64, by dtype of hidden.
FOREIGN = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: The same of a whole model's loss.
LOSS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class OpGate:
    """Judges what a peer computed in one case, forward and backward.

    Args:
        edit: the tensors of the case.
    """

    def __init__(self, case: OpCase, edit: Edit) -> None:
        self.case, self.edit = case, edit
        self._budget = budget(edit)

    def check(self, result: Result, *, own: bool) -> Gate:
        """Own code within the error budget of the test suite; others within ``FOREIGN``."""
        if own:
            try:
                self._budget.check(result)
            except AssertionError as error:
                return Gate(False, str(error))
            return Gate(True, "within the error budget of the tests")
        exact, allowed = self._budget.exact, FOREIGN[DTYPES[self.case.dtype]]
        pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
            "out": (result.out, exact.out),
            **{name: (result.grads.get(name), exact.grads[name]) for name in exact.grads},
        }
        errors = {
            name: relative_error(found, wanted)[0]
            for name, (found, wanted) in pairs.items()
            if found is not None and wanted is not None
        }
        says = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        return Gate(max(errors.values()) <= allowed, f"{says}; allowed {allowed:.0e}")


def check_losses(found: float, wanted: float, dtype: torch.dtype) -> Gate:
    """Whether a wrapped model's loss is the reference's."""
    error, allowed = abs(found - wanted) / max(abs(wanted), 1e-9), LOSS[dtype]
    return Gate(error <= allowed, f"loss off by {error:.1e}, allowed {allowed:.0e}")


def result_of(out: Tensor, grads: Mapping[str, Tensor]) -> Result:
    """A peer's output and gradients under the names of the operator's arguments.

    A name that ends in ".T" is transposed, a name the operator does not have is left out.
    """
    canonical: dict[str, Tensor | None] = dict.fromkeys(("hidden", "encode", "bias", "decode"))
    for name, grad in grads.items():
        plain = name.removesuffix(".T")
        if plain in canonical:
            canonical[plain] = grad.mT if name.endswith(".T") else grad
    return Result(out.detach(), canonical)
