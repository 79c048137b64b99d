"""What a preset holds: settings of one run, what was published of it, and where each value is from.

Importing this imports neither torch nor transformers, so that ``reft presets`` answers at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from reft.config import ReftConfig

#: How a value is known. "changed": by the user, so that it is nobody's published setting.
STATUSES = ("read", "inferred", "assumed", "changed")

#: Sections of settings; "published" holds results.
SECTIONS = ("config", "train", "eval")

_Settings = TypeVar("_Settings")


@dataclass(frozen=True)
class Provenance:
    """How a value is known, and from where."""

    status: str
    source: str

    def __str__(self) -> str:
        return f"{self.status}: {self.source}"

    @classmethod
    def parse(cls, name: str, text: str) -> Provenance:
        """From ``"read: README"``.

        Raises:
            ValueError: another form, or a status that is not one of :data:`STATUSES`.
        """
        status, colon, source = str(text).partition(":")
        if not colon or status not in STATUSES or not source.strip():
            raise ValueError(
                f"provenance of {name} must be '<status>: <source>' with a status of "
                f"{', '.join(STATUSES)}; got {text!r}"
            )
        return cls(status, source.strip())


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains.

    Attributes:
        learning_rate: at its highest.
        epochs: passes over the data.
        batch_size: sequences a device takes at a time.
        accumulate: batches in one optimizer step.
        warmup: share of the steps in which the rate rises.
        weight_decay: of AdamW.
        schedule: of the rate, a name that transformers knows.
        optimizer: a name that transformers knows.
        max_grad_norm: gradients are clipped to it.
        max_length: tokens of a prompt, and of prompt and target together.
        dtype: of the base model; "auto" is bfloat16 on a GPU and float32 elsewhere.
        seeds: of the runs.
        max_records: only so many training records, the first of a shuffle; None for all.
        select_by: metric by which the best epoch is chosen; None for the last step.
        label_dtype: labels of a regression are rounded to it; None for not at all.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    accumulate: int
    warmup: float
    weight_decay: float
    schedule: str
    optimizer: str
    max_grad_norm: float
    max_length: int
    dtype: str
    seeds: tuple[int, ...]
    max_records: int | None = None
    select_by: str | None = None
    label_dtype: str | None = None

    def __post_init__(self) -> None:
        _check(self, "train", _TRAIN)


@dataclass(frozen=True)
class EvalSettings:
    """How a run is scored.

    Attributes:
        sets: names of the sets.
        split: of each.
        batch_size: sequences at a time.
        decoding: name of the task's arguments of ``generate``; None for a classification.
        scoring: name of the task's rule; None for a classification, or where a judge is needed.
        split_rule: how the set is cut in two, one part to choose the best epoch by; None: it is
            not.
        max_records: only the first so many of each set; None for all.
    """

    sets: tuple[str, ...]
    split: str
    batch_size: int
    decoding: str | None = None
    scoring: str | None = None
    split_rule: str | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        _check(self, "eval", _EVAL)


@dataclass(frozen=True)
class Published:
    """What was published of a run, in percent; empty where nothing was.

    Attributes:
        table: of the paper.
        percent: trained parameters in percent of the base model's, as printed.
        params: their number.
        scores: set -> score.
        average: of the scores.
        sd: set -> standard deviation, as printed.
        note: of anything that a reader should know.
    """

    table: str = ""
    percent: float | None = None
    params: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    sd: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """One published run.

    Attributes:
        name: "commonsense/llama-7b/loreft".
        title: one line about it.
        task: a name in :data:`reft.tasks.TASKS`.
        method: what the paper calls it.
        model: what the paper calls it.
        hub_id: of the model.
        config: fields of :class:`reft.ReftConfig`.
        train, eval, published: see there.
        provenance: "config.rank", or "config" for all of a section that have no entry of their own.
    """

    name: str
    title: str
    task: str
    method: str
    model: str
    hub_id: str
    config: Mapping[str, Any]
    train: TrainSettings
    eval: EvalSettings
    published: Published
    provenance: Mapping[str, Provenance]

    def reft_config(self, **changes: Any) -> ReftConfig:
        """The adapter's configuration.

        Raises:
            ValueError: as :class:`reft.ReftConfig`.
        """
        from reft.config import ReftConfig

        return ReftConfig.from_dict({**self.config, **changes})

    def known_from(self, name: str) -> Provenance:
        """Where a value is from: its own entry, or that of its section.

        Raises:
            KeyError: neither is there.
        """
        if name in self.provenance:
            return self.provenance[name]
        return self.provenance[name.partition(".")[0]]

    def changed(self) -> list[str]:
        """Names of the settings that the user changed."""
        return [name for name, one in self.provenance.items() if one.status == "changed"]

    def to_dict(self) -> dict[str, Any]:
        """Every field, as values that JSON knows."""
        values = {
            name: getattr(self, name)
            for name in ("name", "title", "task", "method", "model", "hub_id")
        }
        return {
            **values,
            "config": _plain(self.config),
            "train": _plain(asdict(self.train)),
            "eval": _plain(asdict(self.eval)),
            "published": _plain(asdict(self.published)),
            "provenance": {name: str(one) for name, one in self.provenance.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """The preset that :meth:`to_dict` gave, or that a TOML table is.

        Raises:
            ValueError: a field is missing, unknown or of a bad value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a preset must be a table, got {type(values).__name__}")
        _known("preset", values, [one.name for one in fields(cls)])
        where = f"preset {values.get('name', '?')}"
        missing = [one.name for one in fields(cls) if one.name not in values]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} missing")
        try:
            return cls(
                **{name: str(values[name]) for name in ("name", "title", "task", "method")},
                model=str(values["model"]),
                hub_id=str(values["hub_id"]),
                config=dict(values["config"]),
                train=_settings(TrainSettings, "train", values["train"]),
                eval=_settings(EvalSettings, "eval", values["eval"]),
                published=_settings(Published, "published", values["published"]),
                provenance={
                    name: Provenance.parse(name, text)
                    for name, text in values["provenance"].items()
                },
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'rank'?)" or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


# -------------------------------------------------------------------- checks


def _known(what: str, values: Mapping[str, Any], names: list[str]) -> None:
    for name in values:
        if name not in names:
            raise ValueError(
                f"{what} has no field {name!r}{nearest(name, names)}; its fields are "
                f"{', '.join(names)}"
            )


def _settings(kind: type[_Settings], section: str, values: Any) -> _Settings:
    if not isinstance(values, Mapping):
        raise ValueError(f"{section} must be a table, got {values!r}")
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    _known(section, values, names)
    try:
        return kind(**{name: _frozen(value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{section}: {str(error).partition('() ')[2] or error}") from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """The same as lists and dicts."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


#: field -> (whether a value is allowed, what is allowed in words)
Rule = tuple[Callable[[Any], bool], str]


def _number(low: float, *, strict: bool = False, below: float = math.inf) -> Rule:
    def allowed(value: Any) -> bool:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and (value > low if strict else value >= low) and value < below

    bound = f"above {low:g}" if strict else f"of at least {low:g}"
    return allowed, f"a number {bound}" + (f" and below {below:g}" if below < math.inf else "")


def _integer(low: int) -> Rule:
    return (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low,
        f"a whole number of at least {low}",
    )


def _choice(*names: str) -> Rule:
    return (lambda value: value in names, " or ".join(names))


def _optional(rule: Rule) -> Rule:
    return (lambda value: value is None or rule[0](value), f"none or {rule[1]}")


_TEXT: Rule = (lambda value: isinstance(value, str) and bool(value), "a name")


def _several(one: Rule, what: str) -> Rule:
    def allowed(value: Any) -> bool:
        return (
            isinstance(value, tuple)
            and bool(value)
            and len(set(value)) == len(value)
            and all(map(one[0], value))
        )

    return allowed, what


_TRAIN: Mapping[str, Rule] = MappingProxyType(
    {
        "learning_rate": _number(0, strict=True),
        "epochs": _number(0, strict=True),
        "batch_size": _integer(1),
        "accumulate": _integer(1),
        "warmup": _number(0, below=1),
        "weight_decay": _number(0),
        "schedule": _TEXT,
        "optimizer": _TEXT,
        "max_grad_norm": _number(0),
        "max_length": _integer(1),
        "dtype": _choice("auto", "float32", "bfloat16", "float16"),
        "seeds": _several(_integer(0), "different whole numbers such as 42,43"),
        "max_records": _optional(_integer(1)),
        "select_by": _optional(_TEXT),
        "label_dtype": _optional(_choice("bfloat16", "float16")),
    }
)

_EVAL: Mapping[str, Rule] = MappingProxyType(
    {
        "sets": _several(_TEXT, "different names of sets such as boolq,piqa"),
        "split": _TEXT,
        "batch_size": _integer(1),
        "decoding": _optional(_TEXT),
        "scoring": _optional(_TEXT),
        "split_rule": _optional(_choice("original", "pyreft")),
        "max_records": _optional(_integer(1)),
    }
)


def _check(settings: Any, section: str, rules: Mapping[str, Rule]) -> None:
    for name, (allowed, words) in rules.items():
        value = getattr(settings, name)
        if not allowed(value):
            raise ValueError(f"{section}.{name} must be {words}, got {value!r}")
