"""Repair of Triton's interpreter for new releases of NumPy."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter needs it in a kernel's module
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


def allow_new_numpy() -> None:
    """Let interpreted scalars, such as the ends of loops, be converted to Python integers.

    A scalar of the interpreter is an array of shape (1,). Triton 3.6 converts it with
    ``int(array)``, which NumPy 2.5 refuses for arrays with any dimension. The repair is that of
    later releases of Triton. Nothing is changed if the conversion works.

    Call it only if kernels are interpreted: it runs one.
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
    """Convert ``end`` to a Python integer, which fails where the repair is needed."""
    for _ in range(end):
        pass
