"""A short run of each fuzz target, and the inputs that fuzzing found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import SEPARATOR, TARGETS, attempt

#: Number of inputs per target; `make fuzz` runs longer.
RUNS = {"adapter": 500, "pyreft": 200, "adapters": 200, "records": 150, "preset": 150}

_PYREFT = TARGETS["pyreft"].seeds()
_ADAPTERS = TARGETS["adapters"].seeds()[0]
_PRESET = TARGETS["preset"].seeds()[0]

#: Inputs that once failed: name -> (target, input).
FOUND = {
    "a preset that does not say where a section is from": (
        "preset", _PRESET.replace(b'\neval = "read', b'\nevil = "read')
    ),
    "only a unit that edits nothing": (
        "adapters", _ADAPTERS.replace(b'"prefix_positions": 3, "suffix_positions": 0',
                                      b'"prefix_positions": 0, "suffix_positions": 3')
    ),
    # Found by review, before there was a target.
    "a representation without a layer": (
        "pyreft", b'{"sorted_keys": ["' + _PYREFT[0].split(b'"sorted_keys": ["')[1].split(b'"')[0]
        + b'"], "representations": [[]], "intervention_types": [""]}' + SEPARATOR
    ),
    "a number beyond every float": (
        "preset", _PRESET.replace(b"epochs = ", b"epochs = 1" + b"0" * 400 + b"#")
    ),
    "deep JSON": ("config", b"[" * 100_000),
    "deep TOML": ("preset", b"x=" + b"[" * 100_000),
    "deep records": ("records", b"[" * 100_000),
    "a number of 5000 digits": ("config", b'{"rank": ' + b"1" * 5000 + b"}"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name):
    target, data = FOUND[name]
    assert data not in TARGETS[target].seeds()
    assert not attempt(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_read(target):
    for seed in TARGETS[target].seeds():
        TARGETS[target].run(seed)


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_for_a_moment(target, tmp_path, tmp_path_factory):
    """Inputs are the same in every run with the same version of atheris."""
    pytest.importorskip("atheris", reason="no wheel of atheris for this Python or platform")
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), target]
    options = [f"-runs={RUNS.get(target, 800)}", "-seed=1", "-max_len=8192", "-timeout=30"]
    done = subprocess.run(
        [*command, *options, f"-artifact_prefix={tmp_path}/"],
        capture_output=True, text=True, errors="replace", cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("scratch"))},  # it never tidies up
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INFO: Instrumenting reft" in done.stderr
    assert not list(tmp_path.iterdir())
