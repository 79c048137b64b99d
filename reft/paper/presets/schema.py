"""What a preset holds: settings of one run, what was published of it, and where each value is from.

Importing this imports neither torch nor transformers, so that ``reft presets`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from reft.field_checks import check_fields, refuse_unknown_fields
from reft.paper.presets import checks
from reft.paper.tasks import get_task
from reft.safe_read import shown

if TYPE_CHECKING:
    from reft.config import ReftConfig

#: How a value is known. "changed": by the user, so that it is nobody's published setting.
STATUSES = ("read", "inferred", "assumed", "changed")

#: Sections of settings; "published" holds results.
SETTINGS = ("config", "train", "eval")
SECTIONS = (*SETTINGS, "published")

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
                f"{', '.join(STATUSES)}; got {shown(text)}"
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
        check_fields(self, "train", checks.TRAIN)


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
        check_fields(self, "eval", checks.EVAL)


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

    def __post_init__(self) -> None:
        check_fields(self, "published", checks.PUBLISHED)


@dataclass(frozen=True)
class Preset:
    """One published run.

    Attributes:
        name: "commonsense/llama-7b/loreft".
        title: one line about it.
        task: a name in :data:`reft.paper.tasks.TASKS`.
        method: what the paper calls it.
        model: what the paper calls it.
        hub_id: of the model.
        config: fields of :class:`reft.ReftConfig`.
        train, eval, published: see there.
        provenance: "config.rank", or "config" for all of a section that have no entry of their own.

    Raises:
        ValueError: no such task, or a setting that it does not have.
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

    def __post_init__(self) -> None:
        check_fields(self, "preset", checks.PRESET)
        checks.check_task(get_task(self.task), self.train, self.eval)
        for section in SECTIONS:
            held = getattr(self, section)
            values = held if isinstance(held, Mapping) else asdict(held)
            for name in values:
                if not {section, f"{section}.{name}"} & self.provenance.keys():
                    raise ValueError(
                        f"provenance must say where {section}.{name} is from, or all of {section}"
                    )

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
        return {
            **{name: getattr(self, name) for name in checks.PRESET},
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
        where = f"preset {str(values.get('name', '?'))[:200]}"
        names = [one.name for one in fields(cls)]
        try:
            refuse_unknown_fields("it", values, names)
            missing = [name for name in names if name not in values]
            if missing:
                raise ValueError(f"{', '.join(missing)} must be given")
            return cls(
                **{name: values[name] for name in checks.PRESET},
                config=_table("config", values["config"]),
                train=_settings(TrainSettings, "train", values["train"]),
                eval=_settings(EvalSettings, "eval", values["eval"]),
                published=_settings(Published, "published", values["published"]),
                provenance={
                    name: Provenance.parse(name, text)
                    for name, text in _table("provenance", values["provenance"]).items()
                },
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a table, got {shown(value)}")
    return dict(value)


def _settings(kind: type[_Settings], section: str, values: Any) -> _Settings:
    given = _table(section, values)
    every = fields(kind)  # type: ignore[arg-type]
    refuse_unknown_fields(section, given, [one.name for one in every])
    for one in every:
        if one.name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{section}.{one.name} must be given")
    return kind(**{name: _frozen(value) for name, value in given.items()})


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """The same as lists and dicts."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
