"""Count the bytes that ranks send to each other, at the calls of torch.distributed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Wire(TorchDispatchMode):
    """A mode that counts the bytes given to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            given = args[1] if "_base_" in op._schema.name else args[0]
            self.bytes[op._schema.name.split("::")[1]] += sum(
                tensor.numel() * tensor.element_size()
                for tensor in tree_leaves(given)
                if isinstance(tensor, Tensor)
            )
        return op(*args, **(kwargs or {}))
