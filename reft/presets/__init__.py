"""The published runs of arXiv 2404.03592 as data."""

from __future__ import annotations

from reft.presets.change import override
from reft.presets.load import load, names
from reft.presets.schema import EvalSettings, Preset, Provenance, Published, TrainSettings
from reft.presets.write import to_toml

__all__ = [
    "EvalSettings",
    "Preset",
    "Provenance",
    "Published",
    "TrainSettings",
    "load",
    "names",
    "override",
    "to_toml",
]
