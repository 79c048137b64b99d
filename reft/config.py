"""The configuration of one adapter: every field is checked, and every field survives JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch

from reft.foreign_names import did_you_mean, refusing_foreign_names, unknown_fields
from reft.peft_type import without_entry
from reft.positions import PROMPT_ENDS, SHORT_PROMPTS, UNTIED_BY, Positions, parse_positions
from reft.safe_read import is_text, parse_json, shown
from reft.subspaces import Subspaces, check_subspaces
from reft_kernels.activations import ACTIVATIONS, ALIASES
from reft_kernels.spec import FAMILY, EditSpec

#: The stored form that is written; 1 had no ``untied_by`` and ``subspaces``. docs/versions.md.
FORMAT_VERSION = 2

#: PEFT's task names, and the head modules that PEFT trains and stores beside an adapter for each.
HEAD_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "SEQ_CLS": ("classifier", "score"),
        "TOKEN_CLS": ("classifier", "score"),
        "QUESTION_ANS": ("qa_outputs",),
        "CAUSAL_LM": (),
        "SEQ_2_SEQ_LM": (),
        "FEATURE_EXTRACTION": (),
    }
)

#: What can be edited in every block whose structure is known.
COMPONENTS = ("block_output", "attention_output", "mlp_output")
_SUBMODULE = re.compile(r"module:\w+(\.\w+)*", re.ASCII)

_DTYPES = ("float32", "float64", "bfloat16", "float16")


@refusing_foreign_names
@dataclass(frozen=True)
class ReftConfig:
    """What an adapter is: the edit, its size, where it acts, and what is trained beside it.

    Attributes:
        intervention: a name in ``reft_kernels.spec.FAMILY``; "loreft" is h + Rᵀ(W h + b − R h).
        rank: r, the number of directions edited, at least 1.
        layers: "all", a list of layer numbers, or "3;9;18;24". Negative numbers count from the last
            layer. Kept as "all" or a tuple.
        positions: "f7+l7", "f3", "l1", "prompt", "prompt+g4", "all", "image" or "given"; see
            :mod:`reft.positions`.
        tied: one set of weights for first and last tokens.
        untied_by: what ``tied=False`` means: "side", a set for the first tokens and one for the
            last, as pyreft; "position", a set for each token, the formula of the paper.
        subspaces: names of parts of the rank, such as ``{"german": [0, 1], "polite": [2, 3]}``,
            which a forward may use apart; see :mod:`reft.subspaces`. Kept as pairs.
        activation: name of the function around W h + b, None for none.
        dropout: probability in [0, 1), in training only, on edited tokens only.
        dropout_on: "delta" drops entries of the edit; "row" drops entries of the whole vector, as
            pyreft does.
        component: what is edited in a block: "block_output", the residual stream after it;
            "attention_output" or "mlp_output", what these parts add to it; or
            "module:<path>", the output of another submodule of the block, as wide.
        init: "pyreft" starts as pyreft does, with a small random edit; "identity" with no edit.
        dtype: of the trained parameters; they do not follow the base model's.
        short_prompts: "pyreft" or "paper", how many tokens of a short prompt are edited.
        prompt_end: "last" or "second_to_last", where the prompt is taken to end.
        modules_to_save: names of modules of the base model that are trained in full and stored too.
            Those of an adapter on a model also name the modules that are tied to them.
        task_type: PEFT's name of the task or None. It adds the task's head to ``modules_to_save``
            where the model has one, see :data:`HEAD_MODULES`.
        block_path: name of the ``ModuleList`` that holds the model's blocks, where the model's
            structure does not tell it; None to find it.
        base_model_name_or_path: where the base model came from; for the reader of the file.
        format_version: of the stored form; an older one that was read becomes the present one.

    Raises:
        ValueError: a bad value, naming the field, the value and what is allowed.
    """

    intervention: str = "loreft"
    rank: int = 8
    layers: str | Sequence[int] = "all"
    positions: str = "f7+l7"
    tied: bool = True
    activation: str | None = None
    dropout: float = 0.0
    dropout_on: str = "delta"
    component: str = "block_output"
    init: str = "pyreft"
    dtype: str | torch.dtype = "float32"
    short_prompts: str = "pyreft"
    prompt_end: str = "last"
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    block_path: str | None = None
    untied_by: str = "side"
    subspaces: Mapping[str, Sequence[int]] | Subspaces | None = None
    base_model_name_or_path: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        # Once, not in every forward. No field: it is said by ``positions``.
        object.__setattr__(self, "_parsed", parse_positions(self.positions))
        object.__setattr__(self, "subspaces", check_subspaces(self.subspaces, self.rank))
        if self.untied_by == "position" and (self.tied or self.parsed_positions.kind != "ends"):
            raise ValueError(
                'ReftConfig.untied_by="position" needs tied=False and positions such as "f3+l2", '
                f"got tied={self.tied} and {self.positions!r}"
            )

    # ---------------------------------------------------------------- what it means

    @property
    def spec(self) -> EditSpec:
        """The row of the family table."""
        return FAMILY[self.intervention]

    @property
    def parsed_positions(self) -> Positions:
        """``positions``, parsed."""
        parsed: Positions = self._parsed  # type: ignore[attr-defined]
        return parsed

    @property
    def num_groups(self) -> int:
        """Parameter sets in each layer."""
        return self.parsed_positions.num_groups(self.tied, self.untied_by)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch's object."""
        dtype: torch.dtype = getattr(torch, str(self.dtype))
        return dtype

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """The edited layers of a model with ``num_layers`` blocks: ascending, none negative.

        Raises:
            ValueError: a layer that the model does not have, or two names for one layer.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        named: dict[int, int] = {}
        for layer in self.layers:
            assert isinstance(layer, int)
            index = layer + num_layers if layer < 0 else layer
            if not 0 <= index < num_layers:
                raise ValueError(
                    f"ReftConfig.layers must lie in 0 … {num_layers - 1} (or −{num_layers} … −1) "
                    f"for a model of {num_layers} blocks, got {shown(layer)}"
                )
            if index in named:
                raise ValueError(
                    f"ReftConfig.layers must name each layer once, got {named[index]} and {layer}, "
                    f"both layer {index} of {num_layers}"
                )
            named[index] = layer
        return tuple(sorted(named))

    def resolve_modules_to_save(self, module_names: Iterable[str]) -> tuple[str, ...]:
        """Full names of the base model's modules that are trained and stored beside the edit.

        A name stands for every module whose path ends in it, as in PEFT. The head names that come
        from ``task_type`` may be missing; those in ``modules_to_save`` may not.

        Args:
            module_names: the names of ``base_model.named_modules()``.

        Returns:
            The matches in the model's order, without modules that lie inside another match.

        Raises:
            ValueError: a name in ``modules_to_save`` that no module has.
        """
        present = list(module_names)
        wanted = list(self.modules_to_save or ())
        for name in wanted:
            if not any(_ends_in(path, name) for path in present):
                leaves = {path.rpartition(".")[2] for path in present} - {""}
                raise ValueError(
                    "ReftConfig.modules_to_save must name modules of the base model, got "
                    f"{shown(name)}{did_you_mean(name, leaves)}"
                )
        wanted += HEAD_MODULES.get(self.task_type or "", ())
        found = [path for path in present if any(_ends_in(path, name) for name in wanted)]
        return tuple(
            path for path in found if not any(path.startswith(f"{outer}.") for outer in found)
        )

    # ---------------------------------------------------------------- JSON and back

    def to_dict(self) -> dict[str, Any]:
        """Every field, as values that JSON knows."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        if self.subspaces is not None:
            values["subspaces"] = {name: list(part) for name, part in dict(self.subspaces).items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReftConfig:
        """The configuration that :meth:`to_dict` wrote. Fields that are missing get their defaults.

        Raises:
            ValueError: an unknown field (with the nearest known one), a bad value, a newer format,
                a configuration of PEFT's.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"a ReftConfig is stored as a mapping of fields, got {type(values).__name__}"
            )
        # First the version: the fields of a newer format are not mistakes.
        if "format_version" in values:
            _check_version("format_version", values["format_version"])
        values = without_entry(values)
        message = unknown_fields(values, (field.name for field in fields(cls)), shown)
        if message is not None:
            raise ValueError(message)
        return cls(**values)

    def to_json(self) -> str:
        """Every field as indented JSON text, ending in a newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ReftConfig:
        """The configuration that :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or as :meth:`from_dict`.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a ReftConfig in JSON: {error}") from None
        return cls.from_dict(values)


# -------------------------------------------------------------------- checks


def _bad(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"ReftConfig.{name} must be {allowed}, got {shown(value)}")


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            listed = " or ".join(f'"{one}"' for one in allowed)
            hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
            raise ValueError(f"{_bad(name, value, listed)}{hint}")
        return allowed[allowed.index(value)]  # an enumeration's member is kept as plain text

    return check


def _check_rank(name: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        raise _bad(name, value, "an integer of at least 1")
    return int(value)


def _check_layers(name: str, value: Any) -> str | tuple[int, ...]:
    allowed = '"all", a list of layer numbers such as [2, 5], or "3;9;18;24"'
    if value == "all":
        return "all"
    layers = value
    if isinstance(value, str):
        try:
            layers = [int(part) for part in value.split(";")]
        except ValueError:
            raise _bad(name, value, allowed) from None
    if not isinstance(layers, Sequence) or not layers or not all(_is_int(one) for one in layers):
        raise _bad(name, value, allowed)
    if len(set(layers)) != len(layers):
        raise _bad(name, value, "layer numbers that are all different")
    return tuple(layers)


def _check_component(name: str, value: Any) -> str:
    if isinstance(value, str) and _SUBMODULE.fullmatch(value):
        return value
    try:
        return _one_of(*COMPONENTS)(name, value)
    except ValueError as error:
        raise ValueError(f'{error}; or "module:<path>" of a submodule of the block') from None


def _check_positions(name: str, value: Any) -> str:
    try:
        return str(parse_positions(value))
    except ValueError as error:
        raise ValueError(f"ReftConfig.{error}") from None


def _check_tied(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad(name, value, "True or False")
    return value


def _check_activation(name: str, value: Any) -> str | None:
    known = {*ACTIVATIONS, *ALIASES}
    if value is None or (isinstance(value, str) and value in known):
        return value
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    allowed = f"None or one of {', '.join(sorted(known))}"
    raise ValueError(f"{_bad(name, value, allowed)}{hint}")


def _check_dropout(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise _bad(name, value, "a number in [0, 1)")
    return float(value)


def _check_dtype(name: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    return _one_of(*_DTYPES)(name, value)


def _check_modules(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = isinstance(value, Sequence) and not isinstance(value, str)
    if not names or not all(is_text(one) and one for one in value):
        raise _bad(name, value, 'None or a list of module names such as ["classifier"]')
    return tuple(value)


def _check_task(name: str, value: Any) -> str | None:
    return None if value is None else _one_of(*HEAD_MODULES)(name, value)


def _check_text(name: str, value: Any) -> str | None:
    if value is None or is_text(value):
        return value
    raise _bad(name, value, "None or a string")


def _check_version(name: str, value: Any) -> int:
    if not _is_int(value) or not 1 <= value <= FORMAT_VERSION:
        newer = "; a newer version of reft wrote it, upgrade reft to read it"
        hint = newer if _is_int(value) and value > FORMAT_VERSION else ""
        raise ValueError(f"{_bad(name, value, f'a format from 1 to {FORMAT_VERSION}')}{hint}")
    return FORMAT_VERSION  # what an older form does not say is the default


#: field -> its check, which returns the value as it is kept.
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = MappingProxyType(
    {
        "intervention": _one_of(*FAMILY),
        "rank": _check_rank,
        "layers": _check_layers,
        "positions": _check_positions,
        "tied": _check_tied,
        "activation": _check_activation,
        "dropout": _check_dropout,
        "dropout_on": _one_of("delta", "row"),
        "component": _check_component,
        "init": _one_of("pyreft", "identity"),
        "dtype": _check_dtype,
        "untied_by": _one_of(*UNTIED_BY),
        "short_prompts": _one_of(*SHORT_PROMPTS),
        "prompt_end": _one_of(*PROMPT_ENDS),
        "modules_to_save": _check_modules,
        "task_type": _check_task,
        "block_path": _check_text,
        "base_model_name_or_path": _check_text,
        "format_version": _check_version,
    }
)
