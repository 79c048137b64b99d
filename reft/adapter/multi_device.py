"""The parameters of an adapter whose layers are on several devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter import init
from reft.adapter.edit_weights import LayerWeights
from reft.adapter.parameters import AdapterParameters
from reft.adapter.state_dict import check_state_dict
from reft.adapter.tensor_checks import check_adapter_tensors, stack_shape
from reft.config import ReftConfig


class MultiDeviceParameters(nn.Module):
    """An adapter in parts: one :class:`AdapterParameters` on each device, for the layers there.

    It has the methods of :class:`AdapterParameters`, and its tensors on disk are the same.

    Attributes:
        config, layers, spec, activation, shape: as of :class:`AdapterParameters`.
        parts: one for each device, in the order of their first layers.

    Args:
        config, layers, dim, generator: as of :class:`AdapterParameters`. All values are drawn on
            one device, the generator's or else the first, and so do not depend on the split.
        devices: one for each layer.

    Raises:
        ValueError: as :class:`AdapterParameters`.
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
        self.shape = stack_shape(config, len(layers), dim)
        rows_of: dict[torch.device, list[int]] = {}
        for row, device in enumerate(devices):
            rows_of.setdefault(device, []).append(row)
        # For each part, its rows in the stack of all layers.
        self._rows = list(rows_of.values())
        initial = self._draw(list(rows_of), generator)
        self.parts = nn.ModuleList(
            AdapterParameters(
                config,
                tuple(layers[row] for row in rows),
                dim,
                device=device,
                initial=None if initial is None else initial.select(rows),
            )
            for device, rows in rows_of.items()
        )
        self.activation = self._parts()[0].activation

    def _draw(
        self, devices: list[torch.device], generator: torch.Generator | None
    ) -> init.InitialValues | None:
        """Draw values for all layers; None if every device is "meta"."""
        real = [device for device in devices if device.type != "meta"]
        if not real:
            return None
        device = real[0] if generator is None else generator.device
        wide = torch.promote_types(self.config.torch_dtype, torch.float32)
        return init.draw(self.spec, self.shape, dtype=wide, device=device, generator=generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the parameters, as :meth:`AdapterParameters.reset_parameters`."""
        initial = self._draw([part.bias.device for part in self._parts()], generator)
        for part, rows in zip(self._parts(), self._rows, strict=True):
            part.config = self.config  # its `init` may have been set after loading
            part.reset_parameters(initial=None if initial is None else initial.select(rows))

    @property
    def is_meta(self) -> bool:
        """Whether a part has no values yet."""
        return any(part.is_meta for part in self._parts())

    def _parts(self) -> list[AdapterParameters]:
        return [part for part in self.parts if isinstance(part, AdapterParameters)]

    # ---------------------------------------------------------------- weights of a forward

    def forward(self) -> LayerWeights:
        """Compute A, b and R of all layers, each on the device of its layer, in the order of
        layers."""
        return self._in_layer_order([part() for part in self._parts()])

    def edit_weights(self) -> LayerWeights:
        """Return :meth:`forward`, through a call of the module."""
        weights: LayerWeights = self()
        return weights

    def rotation(self) -> Tensor:
        """Compute R, (L, g, r, D), with a graph, on the device of the first part."""
        rotations = [part.rotation() for part in self._parts()]
        device = rotations[0].device
        return torch.stack(self._in_layer_order([rotation.to(device) for rotation in rotations]))

    def _in_layer_order(self, parts: Sequence[Any]) -> tuple[Any, ...]:
        """Merge what each part has for its layers, in the order of all layers."""
        by_row = {
            row: value
            for rows, values in zip(self._rows, parts, strict=True)
            for row, value in zip(rows, values, strict=True)
        }
        return tuple(by_row[row] for row in range(len(self.layers)))

    def orthonormality_error(self) -> float:
        """Return the largest error of a part."""
        return max(part.orthonormality_error() for part in self._parts())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_adapter_states(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---------------------------------------------------------------- values by name

    def export_state_dict(
        self, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return what :meth:`AdapterParameters.export_state_dict` does, on the CPU."""
        return self._stacked("export_state_dict", state_dict)

    def training_state(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what :meth:`AdapterParameters.training_state` does, on the CPU."""
        return self._stacked("training_state", state_dict)

    def _stacked(self, method: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        exported = []
        for number, part in enumerate(self._parts()):
            prefix = f"parts.{number}."
            part_state = None
            if state_dict is not None:
                part_state = {
                    name.removeprefix(prefix): value
                    for name, value in state_dict.items()
                    if name.startswith(prefix)
                }
            exported.append(getattr(part, method)(part_state))
        return {
            name: torch.stack(self._in_layer_order([tensors[name].cpu() for tensors in exported]))
            for name in exported[0]
        }

    def assign(self, **values: Tensor | None) -> None:
        """Set parameters, as :meth:`AdapterParameters.assign`.

        Raises:
            ValueError: as there. Nothing was changed.
        """
        given = {name: value for name, value in values.items() if value is not None}
        self._set(given, lambda part, tensors: part.assign(**tensors))

    def load(self, tensors: Mapping[str, Tensor], *, training_state: bool = False) -> None:
        """Set every value, as :meth:`AdapterParameters.load`.

        Raises:
            ValueError: as there. Nothing was changed.
        """
        check_adapter_tensors(self.config, self.shape, tensors, training_state=training_state)
        self._set(tensors, lambda part, rows: part.load(rows, training_state=training_state))

    def _set(
        self,
        tensors: Mapping[str, Tensor],
        set_part: Callable[[AdapterParameters, dict[str, Tensor]], None],
    ) -> None:
        """Set the values of each part from its rows of these tensors."""
        for name, value in tensors.items():
            if not value.ndim or value.shape[0] != len(self.layers):
                raise ValueError(
                    f"{name} must have shape ({len(self.layers)}, …), one entry a layer; got "
                    f"{tuple(value.shape)}"
                )
        # Copies first, so that an error of a later part leaves the earlier ones unchanged.
        for parts in (copy.deepcopy(self._parts()), self._parts()):
            for part, rows in zip(parts, self._rows, strict=True):
                set_part(part, {name: value[rows] for name, value in tensors.items()})


def check_adapter_states(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Check a state dict for all adapters in a module, before any is loaded; a pre-hook of
    ``load_state_dict``.

    Raises:
        RuntimeError: see :func:`reft.adapter.state_dict.check_state_dict`.
    """
    for path, adapter in module.named_modules():
        if isinstance(adapter, AdapterParameters):
            check_state_dict(adapter, state_dict, f"{prefix}{path}.")
