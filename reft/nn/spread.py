"""The parameters of an adapter whose layers compute on several devices: one bank for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft.config import ReftConfig
from reft.nn import init
from reft.nn.bank import Bank
from reft.nn.effective import Effective


class SpreadBank(nn.Module):
    """A :class:`reft.nn.bank.Bank` in parts, each on the device of its layers.

    It is called, saved and loaded as a bank is, and its tensors on disk are those of a bank.

    Attributes:
        config, layers, spec, shape: as of a bank.
        parts: one bank for each device, in the order in which the layers come to it.

    Args:
        config, layers, dim, generator: as of a bank. The numbers are drawn on the first device.
        devices: one for each layer.

    Raises:
        ValueError: as a bank.
    """

    def __init__(
        self,
        config: ReftConfig,
        layers: tuple[int, ...],
        dim: int,
        *,
        devices: Sequence[torch.device],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layers, self.spec = config, layers, config.spec
        self.shape = (len(layers), config.num_groups, config.rank, dim)
        rows: dict[torch.device, list[int]] = {}
        for row, device in enumerate(devices):
            rows.setdefault(device, []).append(row)
        # Of each part, its rows in the stack of all layers.
        self._rows = list(rows.values())
        start = self._draw([device for device in rows if device.type != "meta"], generator)
        self.parts = nn.ModuleList(
            Bank(
                config,
                tuple(layers[row] for row in mine),
                dim,
                device=device,
                start=None if start is None else start.select(mine),
            )
            for device, mine in rows.items()
        )

    def _draw(
        self, devices: list[torch.device], generator: torch.Generator | None
    ) -> init.Start | None:
        if not devices or self.config.rank > self.shape[3]:  # which a part then says
            return None
        wide = torch.promote_types(self.config.torch_dtype, torch.float32)
        return init.pyreft(
            self.spec, self.shape, dtype=wide, device=devices[0], generator=generator
        )

    @property
    def is_meta(self) -> bool:
        """Whether a part has no values yet."""
        return any(part.is_meta for part in self._banks())

    def _banks(self) -> list[Bank]:
        return [part for part in self.parts if isinstance(part, Bank)]

    # ---------------------------------------------------------------- what a forward needs

    def forward(self) -> Effective:
        """A, b and R of all layers, each on the device of its layer."""
        forms = [part() for part in self._banks()]
        first = forms[0]
        return Effective(
            encode=None if first.encode is None else self._in_order([f.encode for f in forms]),
            bias=self._in_order([f.bias for f in forms]),
            decode=self._in_order([f.decode for f in forms]),
            subtract=first.subtract,
            activation=first.activation,
        )

    def _in_order(self, parts: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the parts have for each of their layers, in the order of all layers."""
        found = {
            row: value
            for mine, values in zip(self._rows, parts, strict=True)
            for row, value in zip(mine, values, strict=True)
        }
        return tuple(found[row] for row in range(len(self.layers)))

    def orthonormality_error(self) -> float:
        """The largest of the parts'."""
        return max(part.orthonormality_error() for part in self._banks())

    # ---------------------------------------------------------------- values by name

    def published_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As a bank's, on the CPU."""
        return self._joined("published_state", state)

    def training_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As a bank's, on the CPU."""
        return self._joined("training_state", state)

    def _joined(self, method: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        found = []
        for number, part in enumerate(self._banks()):
            prefix = f"parts.{number}."
            own = None
            if state is not None:
                own = {
                    name.removeprefix(prefix): value
                    for name, value in state.items()
                    if name.startswith(prefix)
                }
            found.append(getattr(part, method)(own))
        return {
            name: torch.stack(self._in_order([values[name].cpu() for values in found]))
            for name in found[0]
        }

    def load(self, tensors: Mapping[str, Tensor], *, training_state: bool = False) -> None:
        """As a bank's.

        Raises:
            ValueError: as a bank. Nothing was changed.
        """
        for name, value in tensors.items():
            if not value.ndim or value.shape[0] != len(self.layers):
                raise ValueError(
                    f"{name} must have shape ({len(self.layers)}, …), one entry a layer; got "
                    f"{tuple(value.shape)}"
                )
        before = [part.training_state() for part in self._banks()]
        try:
            for part, mine in zip(self._banks(), self._rows, strict=True):
                own = {name: value[mine] for name, value in tensors.items()}
                part.load(own, training_state=training_state)
        except ValueError:
            for part, values in zip(self._banks(), before, strict=True):
                part.load(values, training_state=True)
            raise
