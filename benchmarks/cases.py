"""Cases: named shapes, with the least bytes and flops that their work needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class OpCase:
    """A call of the edit (LoReFT, R given) on hidden states of shape (batch, sequence, dim).

    Attributes:
        positions: "f7+l7", or "all" for every row.
        groups: 1, or 2 if the end of the prompt has weights of its own (untied).
    """

    positions: str
    batch: int
    sequence: int
    dim: int
    rank: int
    dtype: str = "fp32"
    groups: int = 1

    def __str__(self) -> str:
        untied = "" if self.groups == 1 else "-untied"
        return (
            f"{self.positions}-{self.batch}x{self.sequence}-D{self.dim}-r{self.rank}-{self.dtype}"
            f"{untied}"
        )

    @property
    def rows(self) -> int:
        """n, the number of edited rows."""
        return self.batch * (14 if self.positions == "f7+l7" else self.sequence)

    @property
    def shape(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "rows": self.rows}

    def bytes(self, phase: str) -> int:
        """Bytes to move if each input is read once and each result is written once.

        The forward reads h, writes h′ and saves h for backward: 3·n·D·e. The backward reads v and
        the saved h and writes dh: 3·n·D·e. Both read A and R in float32; the backward also writes
        their gradients.
        """
        size = DTYPES[self.dtype].itemsize
        weights = 2 * self.groups * self.rank * self.dim * 4
        return 3 * self.rows * self.dim * size + weights * (1 if phase == "forward" else 2)

    def flops(self, phase: str) -> int:
        """Flops of A h and Rᵀs (forward), or of R v, Aᵀdu and two outer sums (backward)."""
        return (4 if phase == "forward" else 8) * self.rows * self.rank * self.dim


@dataclass(frozen=True, slots=True)
class RotationCase:
    """Orthonormal R of all layers of a model: from its free parameters, and the gradient back."""

    dim: int
    rank: int
    layers: int

    def __str__(self) -> str:
        return f"D{self.dim}-r{self.rank}-L{self.layers}"

    @property
    def shape(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A whole model with an adapter, and a batch.

    Attributes:
        name: the name of the shape.
        model: "llama" or "roberta", an architecture of transformers with random weights.
        hidden, layers, intermediate, heads, kv_heads, vocabulary: the shape of the model.
        batch, sequence: the shape of the batch; the first half of each sequence is the prompt.
        positions, rank: those of the adapter.
        edited: number of edited layers, counted from the last; None for all.
        dtype: the dtype of the base model.
        sweep: the field that a family of cases varies; None for a single case.
    """

    name: str
    model: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    sequence: int
    positions: str = "f7+l7"
    rank: int = 8
    edited: int | None = None
    dtype: str = "fp32"
    sweep: str | None = None

    def __str__(self) -> str:
        edited = "" if self.edited is None else f"-last{self.edited}"
        sweep = "" if self.sweep is None else f"-over-{self.sweep}"
        return (
            f"{self.name}-{self.batch}x{self.sequence}-{self.positions}-r{self.rank}-{self.dtype}"
            f"{edited}{sweep}"
        )

    @property
    def shape(self) -> dict[str, Any]:
        shown = ("model", "hidden", "layers", "batch", "sequence", "positions", "rank", "dtype")
        fields = {name: getattr(self, name) for name in (*shown, "sweep")}
        return {**fields, "model": self.name, "edited": len(self.edited_layers)}

    @property
    def edited_layers(self) -> list[int]:
        """Indices of the edited blocks."""
        return list(range(self.layers))[-(self.edited or self.layers) :]

    def but(self, **changes: Any) -> ModelCase:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def llama(
    name: str,
    hidden: int,
    layers: int,
    batch: int,
    sequence: int,
    *,
    intermediate: int | None = None,
    kv_heads: int | None = None,
    vocabulary: int = 1024,
    **more: Any,
) -> ModelCase:
    """A Llama of this shape; by default with heads of 64 and an MLP 2.75 times as wide."""
    heads = max(1, hidden // 64)
    return ModelCase(
        name,
        "llama",
        hidden,
        layers,
        intermediate or hidden * 11 // 4,
        heads,
        kv_heads or heads,
        vocabulary,
        batch,
        sequence,
        **more,
    )


LLAMA_1B = llama(
    "Llama-3.2-1B", 2048, 16, 8, 512,
    intermediate=8192, kv_heads=8, vocabulary=128256, dtype="bf16",
)  # fmt: skip
LLAMA_8B = dataclasses.replace(
    llama(
        "Llama-3-8B", 4096, 32, 8, 512,
        intermediate=14336, kv_heads=8, vocabulary=128256, dtype="bf16",
    ),
    heads=32,
)  # fmt: skip
ROBERTA_BASE = ModelCase(
    "RoBERTa-base", "roberta", 768, 12, 3072, 12, 12, 50265, 32, 128, positions="f3", rank=1
)
