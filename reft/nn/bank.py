"""The trained parameters of one adapter, all its layers stacked.

One bank holds W, b and R of every edited layer and group as (L, g, …) tensors, so that what a
forward needs of them, R orthonormal and A = W − R folded, comes from one batched call whatever L
is.

An orthonormal R is not stored: the trained parameter is ``free``, (L, g, D, r), around a fixed
``base`` of r reflectors, and R = orthonormalize(free, base). A new or loaded bank has free = 0,
R in the base; until it is trained, the R that was loaded is used as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from reft.config import ReftConfig
from reft.nn import init
from reft.nn.effective import Effective
from reft.nn.frames import EXACT, check_coordinates, check_frame, frame_error
from reft.nn.published import bank_shape, check_shapes, check_stored
from reft.nn.shards import whole, write
from reft_kernels import fold, orthonormalize, reflector_base
from reft_kernels.activations import ALIASES, activate


class Bank(nn.Module):
    """Parameters of one adapter.

    Attributes:
        config: what the adapter is.
        layers: the numbers of the edited blocks, in the order of the stack.
        weight: W, (L, g, r, D), of ``config.dtype``; None where the family row has none.
        bias: b, (L, g, r).
        free: (L, g, D, r), around ``base`` (a buffer), where R is orthonormal; else None.
        decode: R, (L, g, r, D), where R is free; else None.

    Args:
        config: as above.
        layers: as above.
        dim: D, the width of the residual stream.
        device: where the parameters live; on "meta" nothing is allocated or drawn.
        generator: the source of randomness.
        start: what was drawn already, for these layers.

    Raises:
        ValueError: a rank above D, an impossible "identity".
    """

    weight: nn.Parameter | None
    bias: nn.Parameter
    free: nn.Parameter | None
    decode: nn.Parameter | None
    base: Tensor | None
    loaded: Tensor | None
    fresh: bytes | None = None  # see reft.nn.fresh

    def __init__(
        self,
        config: ReftConfig,
        layers: tuple[int, ...],
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        start: init.Start | None = None,
    ) -> None:
        super().__init__()
        self.shape = bank_shape(config, len(layers), dim)
        self.config, self.layers, self.spec = config, layers, config.spec
        name = config.activation
        self.activation = None if name is None else ALIASES.get(name, name)
        self._cached: tuple[tuple[Any, ...], Effective] | None = None
        self._loaded_of: tuple[Any, ...] | None = None  # what free and base were then
        dtype = config.torch_dtype
        transposed = (*self.shape[:2], dim, config.rank)
        spec = self.spec

        def parameter(shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.register_parameter("weight", parameter(self.shape) if spec.has_encode else None)
        self.register_parameter("bias", parameter(self.shape[:3]))
        self.register_parameter("free", parameter(transposed) if spec.orthonormal else None)
        self.register_parameter("decode", None if spec.orthonormal else parameter(self.shape))
        # Never in state_dict(): a persistent buffer breaks accelerate's memory-saving FSDP start.
        # Its signs and reflectors stay in full precision, whatever is trained around them.
        wide = _compute_dtype(dtype)
        base = torch.empty(transposed, dtype=wide, device=device) if spec.orthonormal else None
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("loaded", None, persistent=False)
        self.reset_parameters(generator, start)

    @property
    def is_meta(self) -> bool:
        """Whether there are no values yet."""
        return self.bias.is_meta

    def extra_repr(self) -> str:
        return "{}, layers={}, groups={}, rank={}, dim={}".format(self.spec.name, *self.shape)

    # ---------------------------------------------------------------- first values

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, start: init.Start | None = None
    ) -> None:
        """Draw first values, or take those of ``start``, as ``config.init`` says; on the meta
        device there is nothing to draw.

        Raises:
            ValueError: "identity" for a row of the family whose edit cannot be zero.
        """
        dtype, kind = self.bias.dtype, self.config.init
        if kind == "identity":
            obstacle = init.identity_obstacle(self.spec, self.activation, dtype)
            if obstacle is not None:
                raise ValueError(
                    f'ReftConfig.init must be "pyreft" for this {self.spec.name}, got "identity": '
                    f"{obstacle}"
                )
        if self.is_meta:
            return
        if start is None:
            wide = _compute_dtype(dtype)
            device = self.bias.device if generator is None else generator.device
            start = init.pyreft(
                self.spec, self.shape, dtype=wide, device=device, generator=generator
            )
        self.assign(rotation=start.rotation, weight=start.weight, bias=start.bias)
        if kind == "identity":
            self.assign(**init.identity(self.spec, start, self.rotation()))

    # ---------------------------------------------------------------- what a forward needs

    def rotation(self) -> Tensor:
        """R, (L, g, r, D), in float32 or wider, orthonormal where the family row says so; with a
        graph."""
        wide = _compute_dtype(self.bias.dtype)
        with _no_autocast(self.bias.device.type):
            if self.free is None:
                assert self.decode is not None
                return self.decode.to(wide)
            learns = torch.is_grad_enabled() and self.free.requires_grad
            if not learns and (loaded := self._still_loaded()) is not None:
                return loaded
            assert self.base is not None
            return orthonormalize(self.free.to(wide), self.base.to(wide))

    def _keep(self, rotation: Tensor) -> None:
        """Use this very R, where it is one to rounding, until it is trained."""
        if self.base is None or rotation.dtype != self.base.dtype or self.base.is_meta:
            return
        if frame_error(rotation) <= EXACT:
            self.loaded = rotation.to(self.base.device, copy=True)
            self._loaded_of = self._frame_of()

    def _still_loaded(self) -> Tensor | None:
        """The R that was loaded, if nothing has changed it since."""
        loaded = self.loaded
        if loaded is None or torch.compiler.is_compiling():
            return None
        assert self.base is not None
        if self._loaded_of != self._frame_of() or loaded.dtype != self.base.dtype:
            self.loaded = loaded = None
        return loaded

    def _frame_of(self) -> tuple[Any, ...]:
        assert self.free is not None and self.base is not None
        return _version(self.free), _version(self.base)

    def forward(self) -> Effective:
        """:meth:`effective`; a call of the module, so that engines which gather parameters do."""
        return self.effective()

    def effective(self) -> Effective:
        """A, b and R of all layers, in float32 or wider, from one batched call.

        No result shares memory with a parameter, so that an engine may free the parameters at once.
        Without gradients and in eval mode it is kept until a parameter changes.
        """
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            self._cached = None
            return self._compute()
        key = tuple(_version(tensor) for tensor in (*self.parameters(), *self.buffers()))
        cached = self._cached  # one look: threads may share a bank
        if cached is None or cached[0] != key:
            self._cached = cached = (key, self._compute())
        return cached[1]

    def _compute(self) -> Effective:
        rotation = self.rotation()
        wide = rotation.dtype
        with _no_autocast(rotation.device.type):
            bias, activation, subtract = self.bias.to(wide), self.activation, self.spec.subtract
            encode = None if self.weight is None else self.weight.to(wide)
            if encode is None and activation is not None:
                bias, activation = activate(activation, bias), None
            encode, subtract = fold(encode, rotation, subtract, activation)
        # unbind, not indexing: its backward is one stack, not one full-size gradient a layer.
        return Effective(
            encode=None if encode is None else _own(encode, self.weight).unbind(0),
            bias=_own(bias, self.bias).unbind(0),
            decode=_own(rotation, self.decode).unbind(0),
            subtract=subtract,
            activation=activation,
        )

    def train(self, mode: bool = True) -> Bank:
        # Some optimizers write past the version counters; between two modes nothing is trusted.
        self._cached = None
        if mode and self.bias.requires_grad:
            self.loaded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_loaded_of": self._still_loaded() is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._loaded_of = self._frame_of() if self._loaded_of else None

    # ``free`` means R only together with ``base``, which is not a key of state_dict(). It travels
    # with the state's metadata, so that a state dict is whole in another bank too.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if self.base is not None and metadata is not None:
            metadata[prefix[:-1]]["base"] = self.base

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        self.fresh = None
        base = local_metadata.get("base")
        if base is not None and self.base is not None and f"{prefix}free" in state_dict:
            with torch.no_grad():
                self.base.copy_(base)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @torch.no_grad()
    def orthonormality_error(self) -> float:
        """max |R Rᵀ − I| over layers and groups; 0.0 where R is not kept orthonormal."""
        return frame_error(self.rotation()) if self.spec.orthonormal else 0.0

    # ---------------------------------------------------------------- values by name

    @torch.no_grad()
    def assign(
        self,
        *,
        rotation: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Set parameters by hand; what is None keeps its value.

        Args:
            rotation: R, (L, g, r, D). Where R is orthonormal its rows must be; it becomes the
                base point and ``free`` is cleared.
            weight: W, (L, g, r, D).
            bias: b, (L, g, r).

        Raises:
            ValueError: a wrong shape, a W where the family row has none, rows that are not
                orthonormal. Nothing was changed.
        """
        given = {"rotation": rotation, "weight": weight, "bias": bias}
        new = {name: value for name, value in given.items() if value is not None}
        check_shapes(self.config, self.shape, new)
        self._cached = self.fresh = None
        if rotation is not None:
            self._assign_rotation(rotation.to(self.bias.device))
        for target, given_value in ((self.weight, weight), (self.bias, bias)):
            if given_value is not None:
                assert target is not None
                write(target, given_value)

    def _assign_rotation(self, rotation: Tensor) -> None:
        if self.decode is not None:
            write(self.decode, rotation)
            return
        assert self.free is not None and self.base is not None
        wide = rotation.to(self.base.dtype)
        check_frame(rotation, wide.dtype, self.spec.name)
        self.base.copy_(reflector_base(wide))
        write(self.free, torch.zeros_like(self.base))
        self.loaded = None

    @torch.no_grad()
    def published_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What an adapter is to its users: ``rotation`` (R), ``weight`` (W), ``bias`` (b), new
        tensors.

        Args:
            state: parameters by their name in this module instead of the module's own, as an engine
                that shards them gathers them.
        """
        own = self._gathered(state)
        published = {"bias": own["bias"].clone()}
        if self.weight is not None:
            published["weight"] = own["weight"].clone()
        if self.free is None:
            published["rotation"] = own["decode"].clone()
        elif state is None and (loaded := self._still_loaded()) is not None:
            published["rotation"] = loaded.clone()
        else:
            free, base = own["free"], self.base
            assert base is not None
            published["rotation"] = orthonormalize(free.to(base.dtype), base.to(free.device))
        return published

    @torch.no_grad()
    def training_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """:meth:`published_state`, and ``rotation.free`` and ``rotation.base``, with which a
        training run continues bit for bit."""
        saved = self.published_state(state)
        if self.base is not None:
            saved["rotation.free"] = self._gathered(state)["free"].clone()
            saved["rotation.base"] = self.base.clone()
        return saved

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, training_state: bool = False) -> None:
        """Set every value from :meth:`published_state` or :meth:`training_state`.

        Args:
            tensors: by name. Without ``training_state`` the tensors of a training run may be
                there and are not read.
            training_state: take ``rotation.free`` and ``rotation.base``, bit for bit.

        Raises:
            ValueError: a missing or unknown name, numbers that are not finite, or as
                :meth:`assign`. Nothing was changed.
        """
        check_stored(self.config, self.shape, tensors, training_state=training_state)
        needed = [name for name in ("rotation", "weight", "bias") if name in tensors]
        if not training_state or not self.spec.orthonormal:
            self.assign(**{name: tensors[name] for name in needed})
            self._keep(tensors["rotation"])
            return
        assert self.free is not None and self.base is not None
        check_coordinates(tensors, self.base.dtype, self.spec.name)
        self.assign(**{name: tensors[name] for name in needed if name != "rotation"})
        self.base.copy_(tensors["rotation.base"])
        write(self.free, tensors["rotation.free"])

    def _gathered(self, state: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """The parameters by name, whole where an engine holds shards (then every rank has to
        call)."""
        own = self.named_parameters()
        return {name: whole(value) for name, value in own} if state is None else state


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _own(value: Tensor, parameter: Tensor | None) -> Tensor:
    """``value`` in memory of its own."""
    return value.clone() if value is parameter else value


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written or replaced."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """R is orthonormal and A exact in float32 only, whatever precision surrounds the model."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
