"""The trainable parameters of one adapter, stacked over its layers.

W, b and R of all edited layers and groups are (L, g, …) tensors. One batched call computes what a
forward needs of them, whatever L is: R orthonormal, and W − R folded into A.

An orthonormal R is not a parameter itself. The parameter is ``free``, (L, g, D, r), around a fixed
``base`` of r reflectors, with R = orthonormalize(free, base). Both are keys of the state dict.
After initialisation or loading, free = 0 and ``base`` holds R. A loaded R is used bit for bit until
it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft.adapter import init
from reft.adapter.casting import apply_keeping_precision
from reft.adapter.edit_weights import LayerWeights
from reft.adapter.sharding import copy_full_tensor, full_tensor
from reft.adapter.state_dict import check_state_dict, replicated_like
from reft.adapter.tensor_checks import (
    EXACT,
    check_adapter_tensors,
    check_coordinates,
    check_orthonormal,
    check_shapes,
    orthonormality_error,
    restore_signs,
    stack_shape,
)
from reft.config import ReftConfig
from reft_kernels import fold, orthonormalize, reflector_base
from reft_kernels.activations import ALIASES, activate
from reft_kernels.dispatch import within_transform
from reft_kernels.spec import EditWeights


class AdapterParameters(nn.Module):
    """The parameters of one adapter.

    Attributes:
        config: the configuration of the adapter.
        layers: the numbers of the edited blocks, in the order of the stack.
        positions: the parsed positions of ``config``.
        sites: (block number, component) of each layer: the outputs that are edited.
        weight: W, (L, g, r, D), or None if the family row has none. Every parameter has the dtype
            ``config.dtype``, or a wider one that the model was cast to.
        bias: b, (L, g, r).
        free: (L, g, D, r), around the buffer ``base``, if R is orthonormal; else None.
        decode: R, (L, g, r, D), if R is free; else None.

    Args:
        config: as above.
        layers: as above.
        dim: D, the width of the residual stream.
        device: where the parameters are; on "meta" nothing is allocated or drawn.
        generator: the source of randomness.
        initial: values of these layers to take instead of drawing them.

    Raises:
        ValueError: a rank above D, an impossible "identity".
    """

    weight: nn.Parameter | None
    bias: nn.Parameter
    free: nn.Parameter | None
    decode: nn.Parameter | None
    base: Tensor | None
    loaded: Tensor | None
    initial_digest: bytes | None = None  # see reft.adapter.untrained

    def __init__(
        self,
        config: ReftConfig,
        layers: tuple[int, ...],
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        initial: init.InitialValues | None = None,
    ) -> None:
        super().__init__()
        self.shape = stack_shape(config, len(layers), dim)
        self.config, self.layers, self.spec = config, layers, config.spec
        self.positions = config.parsed_positions
        self.sites = tuple((layer, config.component) for layer in layers)
        name = config.activation
        self.activation = None if name is None else ALIASES.get(name, name)
        self._cached: tuple[tuple[Any, ...], LayerWeights] | None = None
        self._loaded_versions: tuple[Any, ...] | None = None  # of free and base, on loading
        dtype = config.torch_dtype
        transposed = (*self.shape[:2], dim, config.rank)
        spec = self.spec

        def parameter(shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.register_parameter("weight", parameter(self.shape) if spec.has_encode else None)
        self.register_parameter("bias", parameter(self.shape[:3]))
        self.register_parameter("free", parameter(transposed) if spec.orthonormal else None)
        self.register_parameter("decode", None if spec.orthonormal else parameter(self.shape))
        # The base keeps full precision, whatever the dtype of the parameters.
        wide = torch.promote_types(dtype, torch.float32)
        base = torch.empty(transposed, dtype=wide, device=device) if spec.orthonormal else None
        self.register_buffer("base", base)
        self.register_buffer("loaded", None, persistent=False)
        self.reset_parameters(generator, initial)

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no values yet."""
        return self.bias.is_meta

    def extra_repr(self) -> str:
        return "{}, layers={}, groups={}, rank={}, dim={}".format(self.spec.name, *self.shape)

    # ---------------------------------------------------------------- initialisation

    @torch.no_grad()
    def reset_parameters(
        self,
        generator: torch.Generator | None = None,
        initial: init.InitialValues | None = None,
    ) -> None:
        """Initialise the parameters as ``config.init`` says; on the meta device nothing is drawn.

        Args:
            generator: the source of randomness.
            initial: values to take instead of drawing them.

        Raises:
            ValueError: "identity" for a row of the family whose edit cannot be zero.
        """
        dtype, kind = self.bias.dtype, self.config.init
        if kind == "identity":
            reason = init.why_not_identity(self.spec, self.activation, dtype)
            if reason is not None:
                raise ValueError(
                    f'ReftConfig.init must be "pyreft" for this {self.spec.name}, got "identity": '
                    f"{reason}"
                )
        if self.is_meta:
            return
        if initial is None:
            wide = torch.promote_types(dtype, torch.float32)
            device = self.bias.device if generator is None else generator.device
            initial = init.draw(
                self.spec, self.shape, dtype=wide, device=device, generator=generator
            )
        self.assign(rotation=initial.rotation, weight=initial.weight, bias=initial.bias)
        if kind == "identity":
            self.assign(**init.identity_values(self.spec, initial, self.rotation()))

    # ---------------------------------------------------------------- weights of a forward

    def rotation(self) -> Tensor:
        """Compute R, (L, g, r, D), with a graph, in float32 or wider; orthonormal if the family row
        says so."""
        wide = torch.promote_types(self.bias.dtype, torch.float32)
        if self.free is None:
            assert self.decode is not None
            return self.decode.to(wide)
        learns = torch.is_grad_enabled() and self.free.requires_grad
        if not learns and (loaded := self._current_loaded()) is not None:
            return loaded
        assert self.base is not None
        return orthonormalize(self.free.to(wide), self.base.to(wide))

    def _keep_loaded(self, rotation: Tensor) -> None:
        """Use this very R until it is trained, if it is orthonormal to rounding."""
        if self.base is None or rotation.dtype != self.base.dtype or self.base.is_meta:
            return
        if orthonormality_error(rotation) <= EXACT:
            self.loaded = rotation.to(self.base.device, copy=True)
            self._loaded_versions = self._rotation_versions()

    def _current_loaded(self) -> Tensor | None:
        """Return the R that was loaded, if nothing has changed it since."""
        loaded = self.loaded
        if loaded is None or _is_traced():
            return None
        assert self.base is not None
        changed = self._loaded_versions != self._rotation_versions()
        if changed or loaded.dtype != self.base.dtype:
            self.loaded = loaded = None
        return loaded

    def _rotation_versions(self) -> tuple[Any, ...]:
        assert self.free is not None and self.base is not None
        return _version(self.free), _version(self.base)

    def forward(self) -> LayerWeights:
        """Return :meth:`edit_weights`. Call the module, so that engines which shard parameters
        gather them; they look for the tensors of backward in the tuples that it returns."""
        return self.edit_weights()

    def edit_weights(self) -> LayerWeights:
        """Compute A, b and R of all layers, in float32 or wider, in one batched call.

        No result shares memory with a parameter, so that an engine may free the parameters at once.
        Without gradients and in eval mode the result is cached until a parameter changes.
        """
        if torch.is_grad_enabled() or self.training or _is_traced():
            self._cached = None
            return self._compute()
        versions = tuple(_version(tensor) for tensor in (*self.parameters(), *self.buffers()))
        cached = self._cached  # read once: threads may share the adapter
        if cached is None or cached[0] != versions:
            self._cached = cached = (versions, self._compute())
        return cached[1]

    def _compute(self) -> LayerWeights:
        rotation = self.rotation()
        wide = rotation.dtype
        bias, activation, subtract = self.bias.to(wide), self.activation, self.spec.subtract
        encode = None if self.weight is None else self.weight.to(wide)
        if encode is None and activation is not None:
            bias, activation = activate(activation, bias), None
        encode, subtract = fold(encode, rotation, subtract, activation)
        # unbind, not indexing: its backward is one stack, not one full-size gradient a layer.
        biases = _in_new_memory(bias, self.bias).unbind(0)
        decodes = _in_new_memory(rotation, self.decode).unbind(0)
        encodes: tuple[Tensor | None, ...] = (None,) * len(biases)
        if encode is not None:
            encodes = _in_new_memory(encode, self.weight).unbind(0)
        return tuple(
            EditWeights(*layer, subtract, activation)
            for layer in zip(encodes, biases, decodes, strict=True)
        )

    def train(self, mode: bool = True) -> AdapterParameters:
        # Some optimizers write without raising the version counter: a mode change ends the cache.
        self._cached = None
        if mode and self.bias.requires_grad:
            self.loaded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        is_current = self._current_loaded() is not None
        return {**self.__dict__, "_cached": None, "_loaded_versions": is_current}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._loaded_versions = self._rotation_versions() if self._loaded_versions else None

    # ---------------------------------------------------------------- overrides of nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterParameters:
        dtype = self.config.torch_dtype

        def apply(tensor: Tensor) -> Tensor:
            is_rotation = tensor is self.base or tensor is self.loaded
            return apply_keeping_precision(
                fn, tensor, torch.promote_types(dtype, torch.float32) if is_rotation else dtype
            )

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None:
            destination[f"{prefix}base"] = replicated_like(self.base, self.free)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_state_dict(self, state_dict, prefix)
        self.initial_digest = None
        key = f"{prefix}base"
        if self.base is not None and key in state_dict:
            # torch made this dict for the call: it may be written.
            state_dict[key] = restore_signs(full_tensor(state_dict[key]), self.base.dtype)
            self.loaded = None
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def orthonormality_error(self) -> float:
        """Return max |R Rᵀ − I| over layers and groups; 0.0 if R is free."""
        return orthonormality_error(self.rotation()) if self.spec.orthonormal else 0.0

    # ---------------------------------------------------------------- values by name

    @torch.no_grad()
    def assign(
        self,
        *,
        rotation: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Set parameters; None keeps the value of a parameter.

        Args:
            rotation: R, (L, g, r, D). If R is orthonormal, its rows must be orthonormal; it becomes
                the base point and ``free`` becomes 0.
            weight: W, (L, g, r, D).
            bias: b, (L, g, r).

        Raises:
            ValueError: a wrong shape, a W although the family row has none, rows that are not
                orthonormal. Nothing was changed.
        """
        values = {"rotation": rotation, "weight": weight, "bias": bias}
        given = {name: value for name, value in values.items() if value is not None}
        check_shapes(self.config, self.shape, given)
        self._cached = self.initial_digest = None
        if rotation is not None:
            self._assign_rotation(rotation.to(self.bias.device))
        for target, value in ((self.weight, weight), (self.bias, bias)):
            if value is not None:
                assert target is not None
                copy_full_tensor(target, value)

    def _assign_rotation(self, rotation: Tensor) -> None:
        if self.decode is not None:
            copy_full_tensor(self.decode, rotation)
            return
        assert self.free is not None and self.base is not None
        wide = rotation.to(self.base.dtype)
        check_orthonormal(rotation, wide.dtype, self.spec.name)
        self.base.copy_(reflector_base(wide))
        copy_full_tensor(self.free, torch.zeros_like(self.base))
        self.loaded = None

    @torch.no_grad()
    def export_state_dict(
        self, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return copies of ``rotation`` (R), ``weight`` (W) and ``bias`` (b), as they are saved.

        Args:
            state_dict: the module's state dict, gathered by an engine that shards parameters; None
                to read the module.

        Raises:
            RuntimeError: a state dict that lacks a key or does not fit.
        """
        state = self._full_state(state_dict)
        exported = {"bias": state["bias"].clone()}
        if self.weight is not None:
            exported["weight"] = state["weight"].clone()
        if self.free is None:
            exported["rotation"] = state["decode"].clone()
        elif state_dict is None and (loaded := self._current_loaded()) is not None:
            exported["rotation"] = loaded.clone()
        else:
            free, base = state["free"], state["base"]
            wide = torch.promote_types(free.dtype, torch.float32)
            exported["rotation"] = orthonormalize(free.to(wide), base.to(free.device, wide))
        return exported

    @torch.no_grad()
    def training_state(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return :meth:`export_state_dict` and ``rotation.free`` and ``rotation.base``, from which
        training resumes bit for bit."""
        exported, state = self.export_state_dict(state_dict), self._full_state(state_dict)
        for name in ("free", "base") if self.base is not None else ():
            exported[f"rotation.{name}"] = state[name].clone()
        return exported

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, training_state: bool = False) -> None:
        """Set every value from :meth:`export_state_dict` or :meth:`training_state`.

        Args:
            tensors: by name. Without ``training_state``, ``rotation.free`` and ``rotation.base``
                are optional and ignored.
            training_state: load ``rotation.free`` and ``rotation.base``, bit for bit.

        Raises:
            ValueError: a missing or unknown name, numbers that are not finite, or as
                :meth:`assign`. Nothing was changed.
        """
        check_adapter_tensors(self.config, self.shape, tensors, training_state=training_state)
        names = [name for name in ("rotation", "weight", "bias") if name in tensors]
        if not training_state or not self.spec.orthonormal:
            self.assign(**{name: tensors[name] for name in names})
            self._keep_loaded(tensors["rotation"])
            return
        assert self.free is not None and self.base is not None
        check_coordinates(tensors, self.base.dtype, self.spec.name)
        self.assign(**{name: tensors[name] for name in names if name != "rotation"})
        self.base.copy_(tensors["rotation.base"])
        copy_full_tensor(self.free, tensors["rotation.free"])

    def _full_state(self, state_dict: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Return the state dict, gathered if it is sharded (every rank must call this then)."""
        if state_dict is not None:
            check_state_dict(self, state_dict, "", complete=True)
            if self.base is None:
                return state_dict
            wide = torch.promote_types(state_dict["free"].dtype, torch.float32)
            return {**state_dict, "base": restore_signs(state_dict["base"], wide)}
        state = {name: full_tensor(parameter) for name, parameter in self.named_parameters()}
        return state if self.base is None else {**state, "base": self.base}


def _in_new_memory(value: Tensor, parameter: Tensor | None) -> Tensor:
    """Copy ``value`` if it is the parameter itself."""
    return value.clone() if value is parameter else value


def _is_traced() -> bool:
    """Whether a cached value would hide a parameter from a tracer or a transform: a tangent changes
    neither the memory nor the version of a tensor."""
    return torch.compiler.is_compiling() or within_transform()


def _version(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written or replaced."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
