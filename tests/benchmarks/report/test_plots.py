"""Plots: those with rows are drawn, and the picture depends on the numbers."""

from __future__ import annotations

import dataclasses

from sample_rows import MACHINE, op_rows, row, step, step_rows, sweep_rows

from benchmarks.report.plots import draw
from benchmarks.report.plots.frame import BASELINES, device, style
from benchmarks.report.tables import ORDER


def rotation_rows():
    return [
        row(
            suite="orthonormal",
            metric="forward+backward",
            case=f"{dim}-{rank}",
            shape={"dim": dim, "rank": rank, "layers": 2},
            peer=peer,
            value=1e-6 * dim * rank * slow,
        )
        for dim in (64, 128)
        for rank in (4, 8)
        for peer, slow in (("ours", 1), ("pyreft", 50))
    ]


def every_row():
    backward = [dataclasses.replace(each, metric="backward") for each in op_rows()]
    graphs = [
        dataclasses.replace(each, metric=f"graph_{each.metric}") for each in (*op_rows(), *backward)
    ]
    layers = [dataclasses.replace(each, suite="layer") for each in step_rows()]
    rows = [*op_rows(), *backward, *graphs, *rotation_rows(), *layers, *step_rows(), *sweep_rows()]
    return [each for each in rows if each.value is not None]


PLOTS = [
    "bandwidth.png", "op.png", "bandwidth-graph.png", "op-graph.png", "orthonormal.png",
    "layer.png", "step.png", "sweeps.png",
]  # fmt: skip


def test_every_plot_shows_its_rows(tmp_path):
    """Other numbers give another picture."""
    scaled = [
        dataclasses.replace(
            each, value=each.value * (1 + number % 3), ratio=(each.ratio or 0) * 1.5
        )
        for number, each in enumerate(every_row())
    ]
    pictures = []
    for number, rows in enumerate((every_row(), scaled)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert draw(rows, folder) == PLOTS
        assert sorted(path.name for path in folder.iterdir()) == sorted(PLOTS)
        pictures.append([(folder / name).read_bytes() for name in PLOTS])
    for name, plot, changed in zip(PLOTS, *pictures, strict=True):
        assert plot.startswith(b"\x89PNG\r\n\x1a\n"), name
        assert int.from_bytes(plot[16:20], "big") >= 1200, f"{name}: width in pixels"
        assert plot != changed, name


def test_equal_rows_give_equal_pictures(tmp_path):
    pictures = []
    for _ in range(2):
        assert draw(rotation_rows(), tmp_path) == ["orthonormal.png"]
        pictures.append((tmp_path / "orthonormal.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_peers_do_not_look_alike():
    looks = [style(peer) for peer in ORDER if peer not in BASELINES]
    assert len({(look.color, look.marker, look.dash) for look in looks}) == len(looks)
    assert max(looks, key=lambda look: look.width) is style("ours")


def test_plots_without_rows_are_skipped(tmp_path):
    assert draw([], tmp_path) == []
    assert draw([step("frozen", 1.0), step("ours", None, absent="gone")], tmp_path) == []
    assert draw([dataclasses.replace(each, bandwidth=None) for each in op_rows()], tmp_path) == [
        "op.png"
    ]
    assert draw(sweep_rows(), tmp_path) == ["sweeps.png"]


def test_the_machine_is_named_once():
    later = row(machine=MACHINE | {"commit": "ba9876543210"})
    assert device([row(), later]) == (
        "Slow CPU, 1 thread, torch 2.13.0, commit 0123456789ab, commit ba9876543210"
    )
