"""Presets: the published runs of arXiv 2404.03592 as data."""

from __future__ import annotations

from reft.paper.presets.change import override
from reft.paper.presets.load import load, names
from reft.paper.presets.preset import Preset, Provenance
from reft.paper.presets.settings import EvalSettings, Published, TrainSettings
from reft.paper.presets.write import to_toml

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
