"""Triton's interpreter beside new releases of NumPy."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it beside a kernel
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


def allow_new_numpy() -> None:
    """Make numbers of interpreted scalars, such as the ends of loops, whatever NumPy is installed.

    A scalar of the interpreter is an array with one element, shape (1,). Triton 3.6 makes a number
    of it with ``int(array)``, and NumPy 2.5 refuses that for arrays with any dimension. The repair
    is what later releases of Triton have. Nothing is changed where the fault does not show.

    Only where kernels are interpreted: it runs one.
    """
    try:
        _count[(1,)](1)
    except (InterpreterError, TypeError):
        prepare = interpreter._patch_lang_tensor

        def prepare_and_repair(tensor, scope):
            prepare(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = prepare_and_repair


@triton.jit
def _count(end):
    """Show the fault and do nothing else."""
    for _ in range(end):
        pass
