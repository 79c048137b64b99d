"""The configuration of an adapter; every field is checked and is preserved by JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch

from reft.field_checks import (
    BOOLEAN,
    TEXT,
    FieldCheck,
    check_fields,
    choice,
    did_you_mean,
    integer,
    is_integer,
    number,
    optional,
    quoted,
)
from reft.foreign_names import refusing_foreign_names, unknown_fields
from reft.peft_type import without_entry
from reft.positions import ALLOWED as POSITIONS_ALLOWED
from reft.positions import PROMPT_ENDS, SHORT_PROMPTS, UNTIED_BY, Positions, parse_positions
from reft.safe_read import is_text, parse_json, shown
from reft.subspaces import Subspaces, check_subspaces
from reft_kernels.activations import ACTIVATIONS, ALIASES
from reft_kernels.spec import FAMILY, EditSpec

#: The adapter format that is written and read, see docs/versions.md. Format 1 was never released.
FORMAT_VERSION = 2

#: Data types of trained parameters and of stored tensors.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: PEFT's task types, and the head modules that PEFT trains and stores for each.
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

#: Components that every block of a known structure has.
COMPONENTS = ("block_output", "attention_output", "mlp_output")
_SUBMODULE = re.compile(r"module:\w+(\.\w+)*", re.ASCII)


@refusing_foreign_names
@dataclass(frozen=True)
class ReftConfig:
    """Configuration of an adapter: the edit, its rank and positions, and modules trained in full.

    Attributes:
        intervention: a name in ``reft_kernels.spec.FAMILY``; "loreft" is h + Rᵀ(W h + b − R h).
        rank: r, the number of edited directions, at least 1.
        layers: "all", a list of layer numbers, or "3;9;18;24". Negative numbers count from the last
            layer. Kept as "all" or a tuple.
        positions: "f7+l7", "f3", "l1", "prompt", "prompt+g4", "all", "image" or "given"; see
            :mod:`reft.positions`.
        tied: whether first and last tokens share one parameter set.
        untied_by: the meaning of ``tied=False``: "side", a parameter set for first tokens and one
            for last tokens, as in pyreft; "position", a set for each token, as in the paper.
        subspaces: named parts of the rank, such as ``{"german": [0, 1], "polite": [2, 3]}``, which
            a forward may select; see :mod:`reft.subspaces`. Kept as pairs.
        activation: name of the function around W h + b; None for no function.
        dropout: probability in [0, 1), applied to edited tokens in training.
        dropout_on: "delta" drops entries of the edit; "row" drops entries of the edited vector, as
            pyreft does.
        component: the edited output of a block: "block_output", the residual stream after it;
            "attention_output" or "mlp_output", which are added to the residual stream; or
            "module:<path>", the output of another submodule of the block with the same width.
        init: "pyreft" starts with a small random edit, as pyreft does; "identity" with no edit.
        dtype: data type of the trainable parameters, independent of the base model's.
        short_prompts: "pyreft" or "paper", how many tokens of a short prompt are edited.
        prompt_end: "last" or "second_to_last", the token that ends the prompt.
        modules_to_save: names of modules of the base model that are trained in full and stored with
            the adapter. On a model, modules that are tied to them are added.
        task_type: PEFT's name of the task, or None. It adds the head of the task to
            ``modules_to_save`` if the model has one, see :data:`HEAD_MODULES`.
        block_path: name of the ``ModuleList`` that holds the blocks of the model; None to detect it
            from the structure of the model.
        base_model_name_or_path: the source of the base model, for the reader of the file.
        format_version: of the adapter format, :data:`FORMAT_VERSION`.

    Raises:
        ValueError: a bad value; the message has the field, the value and the allowed values.
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
        check_fields(self, "ReftConfig", _CHECKS)
        # Parsed here, not in every forward. It is no field, because ``positions`` determines it.
        object.__setattr__(self, "_parsed", parse_positions(self.positions))
        object.__setattr__(self, "subspaces", check_subspaces(self.subspaces, self.rank))
        if self.untied_by == "position" and (self.tied or self.parsed_positions.kind != "ends"):
            raise ValueError(
                'ReftConfig.untied_by="position" needs tied=False and positions such as "f3+l2", '
                f"got tied={self.tied} and {self.positions!r}"
            )

    # ---------------------------------------------------------------- derived values

    @property
    def spec(self) -> EditSpec:
        """The row of the intervention in the family table."""
        return FAMILY[self.intervention]

    @property
    def parsed_positions(self) -> Positions:
        """The parsed ``positions``."""
        parsed: Positions = self._parsed  # type: ignore[attr-defined]
        return parsed

    @property
    def num_groups(self) -> int:
        """The number of parameter sets in each layer."""
        return self.parsed_positions.num_groups(self.tied, self.untied_by)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type as a ``torch.dtype``."""
        dtype: torch.dtype = getattr(torch, str(self.dtype))
        return dtype

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the edited layers of a model with ``num_layers`` blocks, ascending from 0.

        Raises:
            ValueError: the model does not have a layer, or two numbers name the same layer.
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
        """Return the full names of the base model's modules that are trained and stored.

        A name matches every module whose path ends in it, as in PEFT. Every name in
        ``modules_to_save`` must match a module; the head names of ``task_type`` need not.

        Args:
            module_names: the names of ``base_model.named_modules()``.

        Returns:
            The matches in the order of the model, without modules inside another match.

        Raises:
            ValueError: a name in ``modules_to_save`` matches no module.
        """
        present = list(module_names)
        names = list(self.modules_to_save or ())
        for name in names:
            if not any(_ends_in(path, name) for path in present):
                leaves = {path.rpartition(".")[2] for path in present} - {""}
                raise ValueError(
                    "ReftConfig.modules_to_save must name modules of the base model, got "
                    f"{shown(name)}{did_you_mean(name, leaves)}"
                )
        names += HEAD_MODULES.get(self.task_type or "", ())
        matches = [path for path in present if any(_ends_in(path, name) for name in names)]
        return tuple(
            path for path in matches if not any(path.startswith(f"{outer}.") for outer in matches)
        )

    # ---------------------------------------------------------------- serialisation

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON values."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        if self.subspaces is not None:
            values["subspaces"] = {name: list(part) for name, part in dict(self.subspaces).items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReftConfig:
        """Build a configuration from :meth:`to_dict`'s result. Missing fields get their defaults.

        Raises:
            ValueError: an unknown field, a bad value, another format, or a configuration of PEFT.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"a ReftConfig is stored as a mapping of fields, got {type(values).__name__}"
            )
        # The version is checked first: unknown fields of a newer format are not mistakes.
        if "format_version" in values:
            _check_version("ReftConfig.format_version", values["format_version"])
        values = without_entry(values)
        message = unknown_fields(values, (field.name for field in fields(cls)), shown)
        if message is not None:
            raise ValueError(message)
        return cls(**values)

    def to_json(self) -> str:
        """Return every field as indented JSON text that ends in a newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ReftConfig:
        """Build a configuration from the text of :meth:`to_json`.

        Raises:
            ValueError: the text is not JSON, or :meth:`from_dict` refuses its values.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a ReftConfig in JSON: {error}") from None
        return cls.from_dict(values)


# -------------------------------------------------------------------- checks


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _read_layers(value: Any) -> str | tuple[int, ...]:
    if value == "all":
        return "all"
    layers = [int(number) for number in value.split(";")] if isinstance(value, str) else value
    if not layers or not all(map(is_integer, layers)) or len(set(layers)) != len(layers):
        raise ValueError
    return tuple(layers)


def _is_module_list(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(is_text(name) and name for name in value)
    )


def _check_dtype(field: str, value: Any) -> Any:
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    return choice(*(str(dtype).removeprefix("torch.") for dtype in FLOATS))(field, name)


def _check_version(field: str, value: Any) -> int:
    if is_integer(value) and value == FORMAT_VERSION:
        return FORMAT_VERSION
    newer = is_integer(value) and value > FORMAT_VERSION
    hint = "; a newer version of reft wrote it, upgrade reft to read it" if newer else ""
    raise ValueError(f"{field} must be {FORMAT_VERSION}, got {shown(value)}{hint}")


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = MappingProxyType(
    {
        "intervention": choice(*FAMILY),
        "rank": integer(1),
        "layers": FieldCheck(
            '"all", a list of different layer numbers such as [2, 5], or "3;9;18;24"',
            lambda value: isinstance(value, Sequence),
            _read_layers,
        ),
        "positions": FieldCheck(
            POSITIONS_ALLOWED,
            lambda value: isinstance(value, str),
            lambda value: str(parse_positions(value)),
        ),
        "tied": BOOLEAN,
        "activation": optional(choice(*sorted({*ACTIVATIONS, *ALIASES}))),
        "dropout": replace(number(0, below=1), keep=float),
        "dropout_on": choice("delta", "row"),
        "component": FieldCheck(
            f'{quoted(COMPONENTS)}, or "module:<path>" for a submodule of the block',
            lambda value: (
                isinstance(value, str)
                and (value in COMPONENTS or _SUBMODULE.fullmatch(value) is not None)
            ),
            names=COMPONENTS,
        ),
        "init": choice("pyreft", "identity"),
        "dtype": _check_dtype,
        "untied_by": choice(*UNTIED_BY),
        "short_prompts": choice(*SHORT_PROMPTS),
        "prompt_end": choice(*PROMPT_ENDS),
        "modules_to_save": optional(
            FieldCheck('a list of module names such as ["classifier"]', _is_module_list, tuple)
        ),
        "task_type": optional(choice(*HEAD_MODULES)),
        "block_path": optional(TEXT),
        "base_model_name_or_path": optional(TEXT),
        "format_version": _check_version,
    }
)
