"""Plots: what there are rows for is drawn, and the picture follows the numbers."""

from __future__ import annotations

import dataclasses

from sample_rows import op_rows, row, step, step_rows, sweep_rows

from benchmarks.report.plots import draw
from benchmarks.report.plots.frame import FLOORS, style
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
    backward = [dataclasses.replace(one, metric="backward") for one in op_rows()]
    graphs = [
        dataclasses.replace(one, metric=f"graph_{one.metric}") for one in (*op_rows(), *backward)
    ]
    layers = [dataclasses.replace(one, suite="layer") for one in step_rows()]
    rows = [*op_rows(), *backward, *graphs, *rotation_rows(), *layers, *step_rows(), *sweep_rows()]
    return [one for one in rows if one.value is not None]


PLOTS = [
    "bandwidth.png", "op.png", "bandwidth-graph.png", "op-graph.png", "orthonormal.png",
    "layer.png", "step.png", "sweeps.png",
]  # fmt: skip


def test_every_plot_shows_its_rows(tmp_path):
    """With other numbers it is another picture."""
    scaled = [
        dataclasses.replace(one, value=one.value * (1 + place % 3), ratio=(one.ratio or 0) * 1.5)
        for place, one in enumerate(every_row())
    ]
    pictures = []
    for number, rows in enumerate((every_row(), scaled)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert draw(rows, folder) == PLOTS
        assert sorted(path.name for path in folder.iterdir()) == sorted(PLOTS)
        pictures.append([(folder / name).read_bytes() for name in PLOTS])
    for name, one, changed in zip(PLOTS, *pictures, strict=True):
        assert one.startswith(b"\x89PNG\r\n\x1a\n"), name
        assert int.from_bytes(one[16:20], "big") >= 1200, f"{name}: width in pixels"
        assert one != changed, name


def test_the_same_rows_are_the_same_picture(tmp_path):
    pictures = []
    for _ in range(2):
        assert draw(rotation_rows(), tmp_path) == ["orthonormal.png"]
        pictures.append((tmp_path / "orthonormal.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_peers_do_not_look_alike():
    looks = [style(peer) for peer in ORDER if peer not in FLOORS]
    assert len({(look.color, look.marker, look.dash) for look in looks}) == len(looks)
    assert max(looks, key=lambda look: look.width) is style("ours")


def test_plots_without_rows_are_skipped(tmp_path):
    assert draw([], tmp_path) == []
    assert draw([step("frozen", 1.0), step("ours", None, absent="gone")], tmp_path) == []
    assert draw([dataclasses.replace(one, bandwidth=None) for one in op_rows()], tmp_path) == [
        "op.png"
    ]
    assert draw(sweep_rows(), tmp_path) == ["sweeps.png"]
