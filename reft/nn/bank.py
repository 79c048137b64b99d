"""The trained parameters of one adapter, all its layers stacked.

One bank holds W, b and R of every edited layer and group as (L, g, …) tensors, so that what a
forward needs of them, R orthonormal and A = W − R folded, comes from one batched call whatever L
is.

An orthonormal R is not stored: the trained parameter is ``free``, (L, g, D, r), around a fixed
``base`` of r reflectors, and R = orthonormalize(free, base). Both are keys of the state dict. A new
or loaded bank has free = 0, R in the base; until it is trained, the R that was loaded is used as it
is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft.config import ReftConfig
from reft.nn import init
from reft.nn.effective import Effective
from reft.nn.frames import EXACT, as_base, check_coordinates, check_frame, frame_error
from reft.nn.precision import applied, compute_dtype, no_autocast
from reft.nn.published import bank_shape, check_shapes, check_stored
from reft.nn.shards import whole, write
from reft.nn.state_dicts import beside, check_state
from reft_kernels import fold, orthonormalize, reflector_base
from reft_kernels.activations import ALIASES, activate
from reft_kernels.dispatch import within_transform


class Bank(nn.Module):
    """Parameters of one adapter.

    Attributes:
        config: what the adapter is.
        layers: the numbers of the edited blocks, in the order of the stack.
        weight: W, (L, g, r, D), of ``config.dtype`` like every parameter, or wider where the model
            was cast to that; None where the family row has none.
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
        # Its signs and reflectors stay in full precision, whatever is trained around them.
        wide = compute_dtype(dtype)
        base = torch.empty(transposed, dtype=wide, device=device) if spec.orthonormal else None
        self.register_buffer("base", base)
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
            wide = compute_dtype(dtype)
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
        wide = compute_dtype(self.bias.dtype)
        with no_autocast(self.bias.device.type):
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
        if loaded is None or _looked_through():
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
        if torch.is_grad_enabled() or self.training or _looked_through():
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
        with no_autocast(rotation.device.type):
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

    # ---------------------------------------------------------------- torch's own ways

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        own = self.config.torch_dtype

        def keeping(tensor: Tensor) -> Tensor:
            fixed = tensor is self.base or tensor is self.loaded
            return applied(fn, tensor, compute_dtype(own) if fixed else own)

        super()._apply(keeping, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None:
            destination[f"{prefix}base"] = beside(self.base, self.free)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_state(self, state_dict, prefix)
        self.fresh = None
        key = f"{prefix}base"
        if self.base is not None and key in state_dict:
            # A dictionary of torch's own, made for this call.
            state_dict[key] = as_base(whole(state_dict[key]), self.base.dtype)
            self.loaded = None
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

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
            state: the module's state dict, as an engine that shards parameters gathers it; None to
                read the module.

        Raises:
            RuntimeError: a state that lacks something, or does not fit.
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
            free, base = own["free"], own["base"]
            wide = compute_dtype(free.dtype)
            published["rotation"] = orthonormalize(free.to(wide), base.to(free.device, wide))
        return published

    @torch.no_grad()
    def training_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """:meth:`published_state`, and ``rotation.free`` and ``rotation.base``, with which a
        training run continues bit for bit."""
        saved, own = self.published_state(state), self._gathered(state)
        for name in ("free", "base") if self.base is not None else ():
            saved[f"rotation.{name}"] = own[name].clone()
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
        """The state by name, whole where an engine holds shards (then every rank has to call)."""
        if state is not None:
            check_state(self, state, "", whole=True)
            if self.base is None:
                return state
            return {**state, "base": as_base(state["base"], compute_dtype(state["free"].dtype))}
        own = {name: whole(value) for name, value in self.named_parameters()}
        return own if self.base is None else {**own, "base": self.base}


def _own(value: Tensor, parameter: Tensor | None) -> Tensor:
    """``value`` in memory of its own."""
    return value.clone() if value is parameter else value


def _looked_through() -> bool:
    """Whether what is kept would hide a parameter from a tracer or a transform: a tangent changes
    neither the memory nor the version of a tensor."""
    return torch.compiler.is_compiling() or within_transform()


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written or replaced."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
