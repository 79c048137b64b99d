"""The parameters of an adapter whose layers compute on several devices: one bank for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter import init
from reft.adapter.casting import compute_dtype
from reft.adapter.edit_weights import LayerWeights
from reft.adapter.parameters import AdapterParameters
from reft.adapter.state_dict import check_state
from reft.adapter.tensor_checks import bank_shape, check_adapter_tensors
from reft.config import ReftConfig


class MultiDeviceParameters(nn.Module):
    """A :class:`AdapterParameters` in parts, each on the device of its layers.

    It is used as a bank is, and its tensors on disk are those of a bank.

    Attributes:
        config, layers, spec, activation, shape: as of a bank.
        parts: one bank for each device, in the order in which the layers come to it.

    Args:
        config, layers, dim, generator: as of a bank. All numbers are drawn on one device, the
            generator's or else the first, so that they are those of a bank there.
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
        self.positions = config.parsed_positions
        self.sites = tuple((layer, config.component) for layer in layers)
        self.shape = bank_shape(config, len(layers), dim)
        rows: dict[torch.device, list[int]] = {}
        for row, device in enumerate(devices):
            rows.setdefault(device, []).append(row)
        # Of each part, its rows in the stack of all layers.
        self._rows = list(rows.values())
        start = self._draw(list(rows), generator)
        self.parts = nn.ModuleList(
            AdapterParameters(
                config,
                tuple(layers[row] for row in mine),
                dim,
                device=device,
                start=None if start is None else start.select(mine),
            )
            for device, mine in rows.items()
        )
        self.activation = self._banks()[0].activation

    def _draw(
        self, devices: list[torch.device], generator: torch.Generator | None
    ) -> init.Start | None:
        real = [device for device in devices if device.type != "meta"]
        if not real:
            return None
        device = real[0] if generator is None else generator.device
        wide = compute_dtype(self.config.torch_dtype)
        return init.pyreft(self.spec, self.shape, dtype=wide, device=device, generator=generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw first values, as a bank does."""
        start = self._draw([part.bias.device for part in self._banks()], generator)
        for part, mine in zip(self._banks(), self._rows, strict=True):
            part.config = self.config  # whose init is told only after an adapter was loaded
            part.reset_parameters(start=None if start is None else start.select(mine))

    @property
    def is_meta(self) -> bool:
        """Whether a part has no values yet."""
        return any(part.is_meta for part in self._banks())

    def _banks(self) -> list[AdapterParameters]:
        return [part for part in self.parts if isinstance(part, AdapterParameters)]

    # ---------------------------------------------------------------- what a forward needs

    def forward(self) -> LayerWeights:
        """Compute A, b and R of all layers, each on the device of its layer, in the order of
        layers."""
        return self._in_order([part() for part in self._banks()])

    def edit_weights(self) -> LayerWeights:
        """Return :meth:`forward`, through a call of the module."""
        weights: LayerWeights = self()
        return weights

    def rotation(self) -> Tensor:
        """R, (L, g, r, D), with a graph, on the device of the first part."""
        rotations = [part.rotation() for part in self._banks()]
        first = rotations[0].device
        return torch.stack(self._in_order([rotation.to(first) for rotation in rotations]))

    def _in_order(self, parts: Sequence[Any]) -> tuple[Any, ...]:
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_banks(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---------------------------------------------------------------- values by name

    def export_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As a bank's, on the CPU."""
        return self._joined("export_state_dict", state)

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

    def assign(self, **values: Tensor | None) -> None:
        """As a bank's.

        Raises:
            ValueError: as a bank. Nothing was changed.
        """
        given = {name: value for name, value in values.items() if value is not None}
        self._set(given, lambda part, own: part.assign(**own))

    def load(self, tensors: Mapping[str, Tensor], *, training_state: bool = False) -> None:
        """As a bank's.

        Raises:
            ValueError: as a bank. Nothing was changed.
        """
        check_adapter_tensors(self.config, self.shape, tensors, training_state=training_state)
        self._set(tensors, lambda part, own: part.load(own, training_state=training_state))

    def _set(
        self,
        tensors: Mapping[str, Tensor],
        give: Callable[[AdapterParameters, dict[str, Tensor]], None],
    ) -> None:
        """Give each part its rows of these tensors."""
        for name, value in tensors.items():
            if not value.ndim or value.shape[0] != len(self.layers):
                raise ValueError(
                    f"{name} must have shape ({len(self.layers)}, …), one entry a layer; got "
                    f"{tuple(value.shape)}"
                )
        # On copies first: what a later part refuses must be found before an earlier one is written.
        for parts in (copy.deepcopy(self._banks()), self._banks()):
            for part, mine in zip(parts, self._rows, strict=True):
                give(part, {name: value[mine] for name, value in tensors.items()})


def check_banks(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict of a module, before any of the banks in it is loaded; a hook of torch's.

    Raises:
        RuntimeError: see :func:`reft.adapter.state_dict.check_state`.
    """
    for path, adapter in module.named_modules():
        if isinstance(adapter, AdapterParameters):
            check_state(adapter, state, f"{prefix}{path}.")
