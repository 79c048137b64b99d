"""Launch settings: the candidates, the lifetime of a trial, and the precedence of the table."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from reft_kernels import lowrank_edit_
from reft_kernels._triton import configs
from reft_kernels.devtools import tuning
from reft_kernels.devtools.testing import Case, budget, make_edit, run_edit

SHAPE = {
    "dim": 4096, "rank": 8, "num_rows": 448, "dtype": torch.bfloat16, "target": "cuda:90",
    "device": "NVIDIA H100 80GB HBM3",
}  # fmt: skip
pytestmark = pytest.mark.host("settings are chosen by the host")
FIELDS = {field.name for field in fields(tuning.KernelConfig)}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write the entries of the table that ``choose`` reads."""
    path = tmp_path / "measured.json"
    monkeypatch.setattr(configs, "TABLE", path)

    def write(*entries):
        path.write_text(json.dumps(entries), encoding="utf-8")
        configs.measured.cache_clear()
        configs._settings.cache_clear()

    yield write
    configs.measured.cache_clear()
    configs._settings.cache_clear()


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("rank", [1, 4, 8, 9, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_are_different_and_the_table_comes_first(kernel, rank, dtype):
    shape = SHAPE | {"rank": rank, "dtype": dtype}
    candidates = tuning.candidates(kernel, **shape)
    assert candidates[0] == configs.choose(kernel, **shape)
    assert len(candidates) >= 8
    assert len({tuning.label(settings) for settings in candidates}) == len(candidates)
    for settings in candidates:
        assert settings.rank >= (
            rank if kernel == "rows" else min(rank, configs.MAX_RANKS_PER_PASS)
        )
        assert settings.rank >= 16 or not settings.dot
        assert not settings.dot or settings.rows < 64, "a wgmma with its left operand in registers"
        assert settings.precision == candidates[0].precision and settings.max_registers == 255
    assert {settings.dot for settings in candidates} == ({True, False} if rank <= 8 else {True})


def test_float64_never_uses_the_matrix_units():
    candidates = tuning.candidates("rows", **SHAPE | {"dtype": torch.float64, "target": "cpu"})
    assert not any(settings.dot for settings in candidates)


def test_only_columns_vary_the_splits():
    assert {settings.splits for settings in tuning.candidates("rows", **SHAPE)} == {1}
    assert len({settings.splits for settings in tuning.candidates("params", **SHAPE)}) >= 3


def test_no_candidate_is_wider_than_the_rows():
    assert all(
        settings.chunk <= 64 for settings in tuning.candidates("rows", **SHAPE | {"dim": 50})
    )


@pytest.mark.interpreter("over 100 builds; `python -m benchmarks sweep` checks each candidate")
@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize(("rank", "dtype"), [(4, torch.float32), (20, torch.bfloat16)])
@pytest.mark.parametrize("backend", ["triton"])
def test_every_candidate_computes_the_edit(backend, rank, dtype, kernel):
    edit = make_edit(Case(70, rank, (3, 20), missing="some", dtype=dtype))
    judge = budget(edit)
    candidates = tuning.candidates(
        kernel, dim=70, rank=rank, num_rows=20, dtype=dtype, target="cpu"
    )
    # The interpreter ignores warps and stages.
    different = dict.fromkeys(replace(settings, warps=4, stages=1) for settings in candidates)
    for settings in different:
        with tuning.trial(kernel, settings):
            judge.check(run_edit(lowrank_edit_, edit, backend=backend))


def test_a_trial_takes_over_and_ends():
    settings, other = (replace(configs.choose("rows", **SHAPE), warps=warps) for warps in (8, 2))
    before = configs.choose("rows", **SHAPE)
    with tuning.trial("rows", settings):
        assert configs.choose("rows", **SHAPE) is settings
        assert configs.choose("rows", **SHAPE | {"dim": 768}) is settings
        with pytest.raises(KeyError), tuning.trial("rows", other):
            assert configs.choose("rows", **SHAPE) is other
            raise KeyError
        assert configs.choose("rows", **SHAPE) is settings
        assert configs.choose("params", **SHAPE) != settings
    assert configs.choose("rows", **SHAPE) == before and not configs.TRIALS


def test_the_table_overrides_the_rules_on_its_device(table):
    table()
    plain = configs.choose("rows", **SHAPE)
    settings = replace(plain, rows=8, warps=16)
    table(tuning.entry("rows", settings, **SHAPE, commit="c", ratio=0.5))
    assert configs.choose("rows", **SHAPE) == settings
    alike = ({"num_rows": 14}, {"rank": 7}, {"dtype": torch.float16}, {"dim": 8192})
    for changes in alike:
        assert configs.choose("rows", **SHAPE | changes).warps == 16, changes
    others = ({"num_rows": 8192}, {"rank": 4}, {"dtype": torch.float32}, {"device": "NVIDIA H200"})
    for changes in others:
        assert configs.choose("rows", **SHAPE | changes).warps != 16, changes
    assert configs.choose("params", **SHAPE).warps != 16


def test_settings_measured_on_wide_rows_fit_narrow_ones(table):
    table()
    wide = replace(configs.choose("rows", **SHAPE), chunk=512)
    table(tuning.entry("rows", wide, **SHAPE))
    assert configs.choose("rows", **SHAPE).chunk == 512
    assert configs.choose("rows", **SHAPE | {"dim": 50}).chunk == 64


def test_groups_share_the_device():
    """Two groups of half the rows are as many programs as one group of all."""
    single, two, many = (
        configs.choose("rows", **SHAPE | {"num_rows": 448 // groups}, groups=groups)
        for groups in (1, 2, 448)
    )
    assert single == two and single.rows == 4
    assert many.rows == 1  # no program holds rows of two groups
    alone = configs.choose("params", **SHAPE)
    assert configs.choose("params", **SHAPE, groups=4).splits < alone.splits


def test_splits_measured_on_many_rows_fit_few(table):
    table()
    split = replace(configs.choose("params", **SHAPE), rows=4, splits=16)
    table(tuning.entry("params", split, **SHAPE))
    assert configs.choose("params", **SHAPE).splits == 16
    assert configs.choose("params", **SHAPE | {"num_rows": 14}).splits == 3
    assert configs.choose("params", **SHAPE | {"num_rows": 1}).splits == 1


def test_an_entry_holds_only_settings_that_differ_from_the_rule(table):
    table()
    plain = configs.choose("rows", **SHAPE)
    made = tuning.entry("rows", replace(plain, stages=5), **SHAPE, ratio=0.9)
    assert made == {
        "key": ["NVIDIA H100 80GB HBM3", "rows", "2", "8", "few"],
        "settings": {"stages": 5},
        "ratio": 0.9,
    }  # fmt: skip


def test_a_table_keeps_entries_that_were_not_measured_again(table):
    table()
    first = tuning.entry("rows", configs.choose("rows", **SHAPE), **SHAPE, ratio=0.9)
    second = tuning.entry("params", configs.choose("params", **SHAPE), **SHAPE, ratio=0.8)
    table(first, second)
    text = tuning.updated_table([{**first, "ratio": 0.7}])
    assert json.loads(text) == [second, {**first, "ratio": 0.7}]  # in order of their keys
    configs.TABLE.write_text(text)
    assert tuning.updated_table([]) == text


def test_the_shipped_table_is_readable_and_sorted():
    text = configs.TABLE.read_text(encoding="utf-8")
    assert tuning.updated_table([]) == text
    for entry in json.loads(text):
        assert entry["key"][1] in tuning.KERNELS and entry["settings"].keys() <= FIELDS
        assert entry["settings"].get("rows", 0) < 64, "wgmma, see configs"


def test_a_device_is_a_target_and_has_a_name(device):
    name = tuning.device_name(device)
    assert name == ("cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
    target = tuning.target_of(device)
    assert target == "cpu" if device.type == "cpu" else target.split(":")[0] in ("cuda", "hip")
