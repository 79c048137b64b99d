"""A preset: the settings of one published run, its results, and the source of each value.

Importing this module imports neither torch nor transformers, so ``reft presets`` starts fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from reft.field_checks import NAME, FieldCheck, check_fields, refuse_unknown_fields
from reft.paper.presets.settings import EvalSettings, Published, TrainSettings
from reft.paper.tasks import GenerationTask, Task, get_task
from reft.safe_read import shown

if TYPE_CHECKING:
    from reft.config import ReftConfig

#: How a value is known. The user changed a "changed" value, so nobody published it.
STATUSES = ("read", "inferred", "assumed", "changed")

#: Sections of settings; "published" holds results.
SETTINGS = ("config", "train", "eval")
SECTIONS = (*SETTINGS, "published")

_Settings = TypeVar("_Settings")

_PATH = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)

#: Fields of a preset outside its sections. The folder of a run is named by ``name``.
PRESET_CHECKS: Mapping[str, FieldCheck] = MappingProxyType(
    {
        "name": FieldCheck(
            "words of letters, digits and -_. with / between, such as "
            "glue/roberta-base/cola/loreft",
            lambda value: isinstance(value, str) and _PATH.fullmatch(value) is not None,
        ),
        **dict.fromkeys(("title", "task", "method", "model", "hub_id"), NAME),
    }
)


@dataclass(frozen=True)
class Provenance:
    """How a value is known, and its source."""

    status: str
    source: str

    def __str__(self) -> str:
        return f"{self.status}: {self.source}"

    @classmethod
    def parse(cls, name: str, text: str) -> Provenance:
        """Parse text such as ``"read: README"``.

        Raises:
            ValueError: another form, or a status that is not in :data:`STATUSES`.
        """
        status, colon, source = str(text).partition(":")
        if not colon or status not in STATUSES or not source.strip():
            raise ValueError(
                f"provenance of {name} must be '<status>: <source>' with a status of "
                f"{', '.join(STATUSES)}; got {shown(text)}"
            )
        return cls(status, source.strip())


@dataclass(frozen=True)
class Preset:
    """One published run.

    Attributes:
        name: such as "commonsense/llama-7b/loreft".
        title: a line about the run.
        task: a name in :data:`reft.paper.tasks.TASKS`.
        method: the method's name in the paper.
        model: the base model's name in the paper.
        hub_id: the base model's name on the hub.
        config: fields of :class:`reft.ReftConfig`.
        train, eval, published: see their classes.
        provenance: source of a value by name ("config.rank"), or of a section ("config") for its
            values without an entry.

    Raises:
        ValueError: an unknown task, or a setting that the task does not have.
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
        check_fields(self, "preset", PRESET_CHECKS)
        _check_task(get_task(self.task), self.train, self.eval)
        for section in SECTIONS:
            held = getattr(self, section)
            values = held if isinstance(held, Mapping) else asdict(held)
            for name in values:
                if not {section, f"{section}.{name}"} & self.provenance.keys():
                    raise ValueError(
                        f"provenance must have an entry for {section}.{name}, or for all of "
                        f"{section}"
                    )

    def reft_config(self, **changes: Any) -> ReftConfig:
        """Build the adapter's configuration.

        Raises:
            ValueError: a value that :class:`reft.ReftConfig` refuses.
        """
        from reft.config import ReftConfig

        return ReftConfig.from_dict({**self.config, **changes})

    def known_from(self, name: str) -> Provenance:
        """Return the source of a value: its own entry, or that of its section.

        Raises:
            KeyError: neither entry exists.
        """
        if name in self.provenance:
            return self.provenance[name]
        return self.provenance[name.partition(".")[0]]

    def changed(self) -> list[str]:
        """List the settings that the user changed."""
        return [name for name, source in self.provenance.items() if source.status == "changed"]

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON values."""
        return {
            **{name: getattr(self, name) for name in PRESET_CHECKS},
            "config": _to_json_value(self.config),
            "train": _to_json_value(asdict(self.train)),
            "eval": _to_json_value(asdict(self.eval)),
            "published": _to_json_value(asdict(self.published)),
            "provenance": {name: str(source) for name, source in self.provenance.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """Build a preset from the result of :meth:`to_dict`, or from a TOML table.

        Raises:
            ValueError: a field is missing, unknown or has a bad value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a preset must be a table, got {type(values).__name__}")
        where = f"preset {str(values.get('name', '?'))[:200]}"
        names = [field.name for field in fields(cls)]
        try:
            refuse_unknown_fields("it", values, names)
            missing = [name for name in names if name not in values]
            if missing:
                raise ValueError(f"{', '.join(missing)} must be given")
            return cls(
                **{name: values[name] for name in PRESET_CHECKS},
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
    known = fields(kind)  # type: ignore[arg-type]
    refuse_unknown_fields(section, given, [field.name for field in known])
    for field in known:
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in given:
            raise ValueError(f"{section}.{field.name} must be given")
    return kind(**{name: _from_json_value(value) for name, value in given.items()})


def _from_json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value


def _to_json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_json_value(entry) for name, entry in value.items()}
    return [_to_json_value(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _check_task(task: Task, train: TrainSettings, evaluation: EvalSettings) -> None:
    """Refuse a set, decoding, scoring rule or metric that the task does not have."""
    where = task.name
    rows: list[tuple[str, str | None, tuple[str | None, ...]]] = [
        ("eval.sets", name, task.eval_sets) for name in evaluation.sets
    ]
    if isinstance(task, GenerationTask):
        rows += [
            ("eval.decoding", evaluation.decoding, tuple(task.decodings)),
            ("eval.scoring", evaluation.scoring, (*task.scorings, None)),
            ("eval.split_rule", evaluation.split_rule, (None,)),
            ("train.select_by", train.select_by, (None,)),
            ("train.label_dtype", train.label_dtype, (None,)),
        ]
    else:
        # The best epoch is chosen on a part of the set: the metric and the split need each other.
        split = evaluation.split_rule is not None
        rounded = (None,) if task.labels else ("bfloat16", None)
        rows += [
            ("eval.decoding", evaluation.decoding, (None,)),
            ("eval.scoring", evaluation.scoring, (None,)),
            ("train.select_by", train.select_by, (task.metric if split else None,)),
            ("train.label_dtype", train.label_dtype, rounded),
        ]
        if train.select_by != (task.metric if split else None):
            where += f" {'with' if split else 'without'} an eval.split_rule"
    for name, value, allowed in rows:
        if value not in allowed:
            options = " or ".join("none" if option is None else option for option in allowed)
            raise ValueError(f"{name} must be {options} for the task {where}, got {shown(value)}")
