"""The report of a device's results: a Markdown page with a section per suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.report.conditions import measured_on
from benchmarks.report.number_format import NONE, quantity
from benchmarks.report.tables import (
    cases_by_peer,
    common_fields,
    markdown,
    model_label,
    overhead,
    overhead_and_range,
    overhead_rows,
    peers_by,
    seconds_and_ratio,
)
from benchmarks.result_rows import Row

#: Fields of a shape that the label of a model shows.
MODEL_FIELDS = ("model", "hidden", "layers", "batch", "sequence", "edited", "sweep")
_METRICS = {
    "forward": "Forward",
    "backward": "Backward",
    "graph_forward": "Forward from a CUDA graph, L2 cache cold",
    "graph_backward": "Backward from a CUDA graph, L2 cache cold",
    "host_forward": "Host time to launch forward",
    "host_backward": "Host time to launch backward",
    "forward+backward": "Forward and backward",
    "buffers": "Buffers beside the parameters",
    "step": "Whole step",
    "op_overhead": "Operator overhead: operators and Python that the frozen model does not run",
    "peak": "peak",
    "saved": "saved for backward",
    "prefill": "prefill",
    "decode": "decoding step",
    "decode_operations": "added operators per token",
    "decode_bytes": "added allocations per token",
    "prefill_op_overhead": "prefill, operator overhead",
    "decode_op_overhead": "decoding step, operator overhead",
    "prefill_over_one": "prefill ÷ prefill with one adapter",
    "decode_over_one": "decoding step ÷ decoding step with one adapter",
    "memory": "bytes per adapter on the device",
    "host_memory": "bytes per adapter on the host",
    "wrap": "wrap",
    "save": "save",
    "load": "load",
}
_TITLES = {
    "op": "The edit alone",
    "orthonormal": "Orthonormal R",
    "layer": "Training step of two decoder layers",
    "step": "Training step of whole models",
    "memory": "Memory of a training step",
    "generate": "Generation",
    "load": "Wrap, save, load",
    "serve": "Several adapters in one batch",
    "sweep": "Launch settings",
}
_OVERHEAD = (
    "Time added to the frozen baseline: the frozen model, whose backward is cut at the first "
    "edited block. Brackets hold the range from p20 to p80 of the rounds. *frozen again* is the "
    "baseline measured a second time: the noise."
)
_INTRODUCTIONS = {
    "op": (
        "One call on hidden states that need a gradient. Brackets hold the median of the rounds' "
        "ratios to *ours*. The share is the bandwidth of *ours* over that of a copy on the device. "
        "Bandwidth is the least number of bytes that the edit must move, over its time."
    ),
    "orthonormal": (
        "R of all layers from its free parameters, and the gradient back. Brackets hold the ratio "
        "to *ours*."
    ),
    "layer": _OVERHEAD,
    "step": _OVERHEAD,
    "memory": (
        "Bytes added to the frozen baseline: at the peak of forward, backward and AdamW, and saved "
        "by a forward for its backward."
    ),
    "generate": (
        "Time added to the *base* model without an adapter, for prompt and decoding step; "
        "then operators and allocated bytes that a token adds."
    ),
    "serve": (
        "One batch that mixes this many different adapters: its prompts, and a decoding step. "
        "Brackets hold the ratio to the *base* model without any adapter."
    ),
    "load": "Seconds; brackets hold the ratio to *ours*.",
    "sweep": (
        "Forward and backward together, with the settings of one kernel varied: rows × rank × "
        "chunk, unit, warps, stages, splits. The five fastest are shown beside the current "
        "*table*; ratios are to the table."
    ),
}
#: Maps a suite to its plots, by the first word of their names.
_PLOTS = {
    "op": ("bandwidth", "op"),
    "orthonormal": ("orthonormal",),
    "layer": ("layer",),
    "step": ("step", "sweeps"),
}


def render_report(rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """Write the report as Markdown: the machine, then a section per suite.

    Args:
        plots: names of the PNG files in the folder of the report.
    """
    parts = ["# Benchmark results", *measured_on(rows)]
    suites = list(dict.fromkeys(row.suite for row in rows))
    known = [suite for suite in _TITLES if suite in suites]
    for suite in (*known, *(name for name in suites if name not in known)):
        group = [row for row in rows if row.suite == suite]
        parts.append(f"## {_TITLES.get(suite, suite)}")
        parts += [_INTRODUCTIONS[suite]] if suite in _INTRODUCTIONS else []
        parts += [f"![{name}]({name})" for name in plots if _belongs(name, suite)]
        parts += _SECTIONS.get(suite, _plain_section)(group)
    return "\n\n".join(parts) + "\n"


def _belongs(plot: str, suite: str) -> bool:
    return plot.removesuffix(".png").split("-")[0] in _PLOTS.get(suite, ())


def _by_metric(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each metric, in the order of ``_METRICS``."""
    known = list(_METRICS)
    names = dict.fromkeys(row.metric for row in rows)
    ordered = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    return [
        (_METRICS.get(name, name), [row for row in rows if row.metric == name]) for name in ordered
    ]


def _caption(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> list[str]:
    """The fields that all cases share; an empty list if there are none."""
    common = common_fields(rows, leave_out)
    return [f"All: {common}."] if common else []


def _op_section(rows: Sequence[Row]) -> list[str]:
    parts = []
    for title, group in _by_metric(rows):
        shares = {
            row.case: f"{100 * row.share:.3g} %"
            for row in group
            if row.peer == "ours" and row.share and "host" not in row.metric
        }
        table = cases_by_peer(group, seconds_and_ratio, ("share of *ours*", shares))
        parts += [f"### {title}", *_caption(group), table]
    return parts


def _plain_section(rows: Sequence[Row]) -> list[str]:
    parts = []
    for title, group in _by_metric(rows):
        parts += [f"### {title}", *_caption(group), cases_by_peer(group, seconds_and_ratio)]
    return parts


def _step_section(rows: Sequence[Row]) -> list[str]:
    """AdapterCache of the whole models, then a table per field that is swept."""
    models = [row for row in rows if row.shape.get("sweep") is None]
    parts = _caption(models, MODEL_FIELDS) if models else []
    for title, group in _by_metric(models):
        parts += [f"### {title}"]
        parts.append(peers_by(group, lambda row: model_label(row, models), overhead_and_range))
    for sweep in dict.fromkeys(row.shape.get("sweep") for row in rows if row not in models):
        group = overhead_rows(row for row in rows if row.shape.get("sweep") == sweep)
        field = "edited" if sweep == "layers" else str(sweep)
        label = {"edited": "edited layers", "sequence": "tokens"}.get(field, field)
        parts += [
            f"### Over {'length' if sweep == 'sequence' else sweep}",
            *_caption(group, ("hidden", "sweep", field)),
            peers_by(group, _field_column(label, field), overhead),
        ]
    return parts


def _field_column(label: str, field: str) -> Callable[[Row], str]:
    return lambda row: f"{label} {row.shape.get(field)}"


def _table_per_case(cell: Callable[[Row], str]) -> Callable[[Sequence[Row]], list[str]]:
    """A section with a table per case: a line per peer, a column per metric."""

    def section(rows: Sequence[Row]) -> list[str]:
        parts = []
        for case in dict.fromkeys(row.case for row in rows):
            group = [row for row in rows if row.case == case]
            ordered = [row for _, metric in _by_metric(group) for row in metric]
            common = common_fields(group, ("model", "batch", "sequence", "sweep"))
            parts += [
                f"### {model_label(group[0], group)}",
                f"{common[:1].upper()}{common[1:]}.",
                peers_by(ordered, lambda row: _METRICS.get(row.metric, row.metric), cell),
            ]
        return parts

    return section


def _sweep_section(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case, kernel in dict.fromkeys((row.case, row.metric) for row in rows):
        group = [row for row in rows if (row.case, row.metric) == (case, kernel)]
        timed = sorted((row for row in group if row.ratio), key=lambda row: row.ratio or 0.0)
        best = timed[:5] + [row for row in timed[5:] if row.peer == "table"]
        lines += [[case, kernel, row.peer, _number(row), f"{row.ratio or 0.0:.3f}"] for row in best]
        lines += [[case, kernel, row.peer, NONE, str(row.absent)] for row in group if row.absent]
    return [markdown(["case", "kernel", "settings", "time", "ratio"], lines, left=3)]


def _number(row: Row) -> str:
    return quantity(row.value or 0.0, row.unit)


def _overhead_or_number(row: Row) -> str:
    return overhead(row) if row.unit == "s" else _number(row)


_SECTIONS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "op": _op_section,
    "layer": _step_section,
    "step": _step_section,
    "memory": _table_per_case(_number),
    "generate": _table_per_case(_overhead_or_number),
    "load": _table_per_case(seconds_and_ratio),
    "sweep": _sweep_section,
}
