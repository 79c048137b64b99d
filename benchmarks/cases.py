"""What is measured: shapes by name, with the bytes and flops that the work itself needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class OpCase:
    """One call of the edit, LoReFT with a given R, on hidden of (batch, sequence, dim).

    Attributes:
        positions: "f7+l7", or "all": every row.
        groups: 1, or 2 for weights of their own at the prompt's end.
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
        """n, the rows that are edited."""
        return self.batch * (14 if self.positions == "f7+l7" else self.sequence)

    @property
    def shape(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "rows": self.rows}

    def bytes(self, phase: str) -> int:
        """What must pass through memory: each input read once, each result written once.

        forward: h read, h′ written and h kept for backward, 3·n·D·e. backward: v and the kept h
        read, dh written, 3·n·D·e. Both: A and R read, in backward their gradients written, in
        float32.
        """
        size = DTYPES[self.dtype].itemsize
        weights = 2 * self.groups * self.rank * self.dim * 4
        return 3 * self.rows * self.dim * size + weights * (1 if phase == "forward" else 2)

    def flops(self, phase: str) -> int:
        """forward: A h and Rᵀs. backward: R v, Aᵀdu, and the two outer sums."""
        return (4 if phase == "forward" else 8) * self.rows * self.rank * self.dim


@dataclass(frozen=True, slots=True)
class RotationCase:
    """Orthonormal R of all layers of a model, from its free parameters and back."""

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
        model: "llama" or "roberta", an architecture of transformers with random weights.
        hidden, layers, intermediate, heads, kv_heads, vocabulary: its shape.
        name: what this shape is known as.
        batch, sequence: of the training batch; the first half of each sequence is the prompt.
        positions, rank: of the adapter; on every layer, or the last ``edited`` of them.
        dtype: of the base model.
        sweep: the field that a family of cases varies.
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
        kept = ("model", "hidden", "layers", "batch", "sequence", "positions", "rank", "dtype")
        fields = {name: getattr(self, name) for name in (*kept, "sweep")}
        return {**fields, "model": self.name, "edited": len(self.edited_layers)}

    @property
    def edited_layers(self) -> list[int]:
        """Numbers of the edited blocks."""
        return list(range(self.layers))[-(self.edited or self.layers) :]

    def but(self, **changes: Any) -> ModelCase:
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
    """A Llama of this shape; heads of 64 and an MLP 2.75 times as wide if not said."""
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
