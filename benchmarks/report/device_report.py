"""``python -m benchmarks report``: results as a page with tables and plots, and README's table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import ROOT
from benchmarks.report.tables import (
    NONE,
    by_key,
    cases_by_peer,
    constants,
    in_order,
    markdown,
    model_label,
    most_exact,
    overhead,
    overhead_and_range,
    peers_by,
    quantity,
    seconds_and_ratio,
)
from benchmarks.result_rows import RESULTS, Row, read
from benchmarks.run import stop

BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"
_SHAPE_OF_MODEL = ("model", "hidden", "layers", "batch", "sequence", "edited", "sweep")
_METRICS = {
    "forward": "Forward",
    "backward": "Backward",
    "graph_forward": "Forward from a CUDA graph, L2 cache cold",
    "graph_backward": "Backward from a CUDA graph, L2 cache cold",
    "host_forward": "Forward, until the host has launched it",
    "host_backward": "Backward, until the host has launched it",
    "forward+backward": "Forward and backward",
    "buffers": "Buffers beside the parameters",
    "step": "Whole step",
    "counted": "Counted: operators and Python that the frozen model does not run",
    "peak": "peak",
    "saved": "kept for backward",
    "prefill": "prefill",
    "decode": "a decoded token",
    "decode_operations": "operators more a token",
    "decode_bytes": "allocated more a token",
    "prefill_counted": "prefill, counted",
    "decode_counted": "a decoded token, counted",
    "prefill_over_one": "prefill over the same with one adapter",
    "decode_over_one": "a decoded token over the same with one adapter",
    "memory": "bytes an adapter on the device",
    "host_memory": "bytes an adapter on the host",
    "wrap": "wrap",
    "save": "save",
    "load": "load",
}
_TITLES = {
    "op": "The edit itself",
    "orthonormal": "Orthonormal R",
    "layer": "Training step of two decoder layers",
    "step": "Training step of whole models",
    "memory": "Memory of a training step",
    "generate": "Generation",
    "load": "Wrap, save, load",
    "serve": "Many adapters in one batch",
    "sweep": "Launch settings",
}
_OVERHEAD = (
    "Time beyond the frozen model's own, whose backward is cut at the first edited block; in "
    "brackets p20 to p80 of the rounds. "
    "*frozen again* is that floor measured twice: the noise."
)
_SAYS = {
    "op": (
        "One call on hidden states that autograd follows; in brackets the median of the rounds' "
        "ratios to *ours*. The share is that of the bandwidth of the device's own copy: bytes "
        "that the work needs at least, over the time of *ours*, over that bandwidth."
    ),
    "orthonormal": (
        "R of all layers from its free parameters, and the gradient back; in brackets the ratio "
        "to *ours*."
    ),
    "layer": _OVERHEAD,
    "step": _OVERHEAD,
    "memory": (
        "Bytes beyond the frozen model's own: at the peak of forward, backward and AdamW, and "
        "what a forward keeps for backward."
    ),
    "generate": (
        "Time of the prompt, and of a token after it, over those of the *base* model without an "
        "adapter; then what a token costs in operators and allocated bytes more than there."
    ),
    "serve": (
        "One batch in which so many different adapters are mixed: its prompts, and a step of "
        "decoding; in brackets the ratio to the *base* model without any."
    ),
    "load": "The time of each; in brackets the ratio to *ours*.",
    "sweep": (
        "Forward and backward together, with one kernel's settings varied: rows × rank × chunk, "
        "unit, warps, stages, splits. The fastest five and the *table*'s; the ratio is to those."
    ),
}
#: Suite -> the plots that belong to it, by the beginning of their names.
_PLOTS = {
    "op": ("bandwidth", "op"),
    "orthonormal": ("orthonormal",),
    "layer": ("layer",),
    "step": ("step", "sweeps"),
}


def write_report(
    folder: Annotated[
        Path, typer.Argument(help="Results of one device.", show_default="results/cpu")
    ] = RESULTS / "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the page and plots. Default: FOLDER/report.")
    ] = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Rewrite README's benchmark table, and nothing else.")
    ] = False,
    serving: Annotated[
        bool, typer.Option("--serving", help="Rewrite the table and plot of docs/serving.md alone.")
    ] = False,
) -> None:
    """Write tables and plots of results, or with --readme the table in README.md."""
    try:
        rows = read(folder)
        by_key(rows)
        if readme:
            path = ROOT / "README.md"
            rewrite(path, readme_table(rows))
            typer.echo(f"table written to {path}")
            return
        if serving:
            from benchmarks.report.serving_table import write_page

            own = [row for row in rows if row.suite == "serve"]
            typer.echo(f"table written to {write_page(own, machine_lines(own))}")
            return
        beside = output or (folder if folder.is_dir() else folder.parent) / "report"
        beside.mkdir(parents=True, exist_ok=True)
        from benchmarks.report.plots import draw

        page = beside / "report.md"
        page.write_text(render(rows), encoding="utf-8")  # to be there if a plot fails
        plots = draw(rows, beside)
        page.write_text(render(rows, plots), encoding="utf-8")
    except (OSError, ValueError) as error:
        stop(str(error), 2)
    typer.echo(f"{page}: {len(rows)} rows, {len(plots)} plots")


# ------------------------------------------------------------------ the page


def render(rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """The page: what it was measured on, then a section a suite.

    Args:
        plots: names of the PNG files beside the page.
    """
    parts = ["# Benchmark results", *machine_lines(rows)]
    suites = list(dict.fromkeys(row.suite for row in rows))
    known = [suite for suite in _TITLES if suite in suites]
    for suite in (*known, *(one for one in suites if one not in known)):
        own = [row for row in rows if row.suite == suite]
        parts.append(f"## {_TITLES.get(suite, suite)}")
        parts += [_SAYS[suite]] if suite in _SAYS else []
        parts += [f"![{name}]({name})" for name in plots if _belongs(name, suite)]
        parts += _BODIES.get(suite, _plain)(own)
    return "\n\n".join(parts) + "\n"


def _belongs(plot: str, suite: str) -> bool:
    return plot.removesuffix(".png").split("-")[0] in _PLOTS.get(suite, ())


def machine_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each machine and state of the code that rows come from."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_machine(row.machine), []).append(row)
    lines = []
    for machine, own in groups.items():
        only = ""
        if len(groups) > 1:
            only = f" ({', '.join(dict.fromkeys(row.suite for row in own))})"
        lines.append(f"Measured{only} on {machine}; {peer_versions(own)}{_days(own)}.")
    return lines


def _machine(machine: dict[str, Any]) -> str:
    threads, cores = machine.get("threads"), machine.get("cores")
    said = [str(machine.get("device", "an unknown device"))]
    if machine.get("driver"):
        said.append(f"driver {machine['driver']}")
    if threads:
        said.append(
            f"{threads} thread{'s' * (threads != 1)}" + (f" of {cores} cores" if cores else "")
        )
    said += [
        f"{key} {machine[key]}" for key in ("torch", "triton", "transformers") if machine.get(key)
    ]
    if machine.get("python"):
        said.append(f"Python {machine['python']}")
    if machine.get("platform"):
        said.append(machine["platform"])
    if machine.get("commit"):
        commit = str(machine["commit"])
        changed = " with uncommitted changes" if commit.endswith("+") else ""
        said.append(f"commit {commit.rstrip('+')}{changed}")
    return ", ".join(said)


def peer_versions(rows: Sequence[Row]) -> str:
    """ "pyreft 0.1.0, adapters 1.2.0; ", or nothing."""
    found = dict.fromkeys(
        f"{row.peer.split(',')[0]}{' of PEFT' * (row.peer == 'LoRA')} {row.version}"
        for row in in_order(rows)
        if row.version and not row.peer.startswith("ours")
    )
    return ", ".join(found) + "; " if found else ""


def _days(rows: Sequence[Row]) -> str:
    days = sorted({row.when[:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


# ------------------------------------------------------------------ sections


def _by_metric(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each metric, in the order of ``_METRICS``."""
    known = list(_METRICS)
    names = dict.fromkeys(row.metric for row in rows)
    ordered = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    return [
        (_METRICS.get(name, name), [row for row in rows if row.metric == name]) for name in ordered
    ]


def _op(rows: Sequence[Row]) -> list[str]:
    parts = []
    for title, own in _by_metric(rows):
        shares = {
            row.case: f"{100 * row.share:.3g} %"
            for row in own
            if row.peer == "ours" and row.share and "host" not in row.metric
        }
        table = cases_by_peer(own, seconds_and_ratio, ("share of *ours*", shares))
        parts += [f"### {title}", *_caption(own), table]
    return parts


def _caption(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> list[str]:
    """What all cases have in common; nothing if that is nothing or there is but one case."""
    common = constants(rows, leave_out)
    return [f"All: {common}."] if common else []


def _plain(rows: Sequence[Row]) -> list[str]:
    parts = []
    for title, own in _by_metric(rows):
        parts += [f"### {title}", *_caption(own), cases_by_peer(own, seconds_and_ratio)]
    return parts


def _models(rows: Sequence[Row]) -> list[str]:
    whole = [row for row in rows if row.shape.get("sweep") is None]
    parts = _caption(whole, _SHAPE_OF_MODEL) if whole else []
    for title, own in _by_metric(whole):
        parts += [f"### {title}"]
        parts.append(peers_by(own, lambda row: model_label(row, whole), overhead_and_range))
    for sweep in dict.fromkeys(row.shape.get("sweep") for row in rows if row not in whole):
        own = most_exact(row for row in rows if row.shape.get("sweep") == sweep)
        field = "edited" if sweep == "layers" else str(sweep)
        said = {"edited": "edited layers", "sequence": "tokens"}.get(field, field)
        parts += [
            f"### Over {'length' if sweep == 'sequence' else sweep}",
            *_caption(own, ("hidden", "sweep", field)),
            peers_by(own, _headed(said, field), overhead),
        ]
    return parts


def _headed(said: str, field: str) -> Callable[[Row], str]:
    return lambda row: f"{said} {row.shape.get(field)}"


def _by_model(cell: Callable[[Row], str]) -> Callable[[Sequence[Row]], list[str]]:
    """A table a case: peers below one another, metrics beside one another."""

    def body(rows: Sequence[Row]) -> list[str]:
        parts = []
        for case in dict.fromkeys(row.case for row in rows):
            own = [row for row in rows if row.case == case]
            ordered = [row for _, group in _by_metric(own) for row in group]
            common = constants(own, ("model", "batch", "sequence", "sweep"))
            parts += [
                f"### {model_label(own[0], own)}",
                f"{common[:1].upper()}{common[1:]}.",
                peers_by(ordered, lambda row: _METRICS.get(row.metric, row.metric), cell),
            ]
        return parts

    return body


def _sweep(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case, kernel in dict.fromkeys((row.case, row.metric) for row in rows):
        own = [row for row in rows if (row.case, row.metric) == (case, kernel)]
        timed = sorted((row for row in own if row.ratio), key=lambda row: row.ratio or 0.0)
        best = timed[:5] + [row for row in timed[5:] if row.peer == "table"]
        lines += [[case, kernel, row.peer, _number(row), f"{row.ratio or 0.0:.3f}"] for row in best]
        lines += [[case, kernel, row.peer, NONE, str(row.absent)] for row in own if row.absent]
    return [markdown(["case", "kernel", "settings", "time", "ratio"], lines, left=3)]


def _number(row: Row) -> str:
    return quantity(row.value or 0.0, row.unit)


def _generated(row: Row) -> str:
    return overhead(row) if row.unit == "s" else _number(row)


_BODIES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "op": _op,
    "layer": _models,
    "step": _models,
    "memory": _by_model(_number),
    "generate": _by_model(_generated),
    "load": _by_model(seconds_and_ratio),
    "sweep": _sweep,
}


# ------------------------------------------------------------------ README


def readme_table(rows: Sequence[Row]) -> str:
    """README's table: overhead of a training step, peers by models.

    Raises:
        ValueError: no rows of the step suite.
    """
    own = most_exact(row for row in rows if row.suite == "step")
    own = [row for row in own if row.shape.get("sweep") is None]
    if not own:
        raise ValueError("README's table is of the step suite, and there are no rows of it")
    common = constants(own, _SHAPE_OF_MODEL)
    says = (
        "A training step (forward, backward, AdamW) beyond the time of the frozen model, whose "
        "backward is cut at the first edited block; *frozen again* is that floor measured twice."
    )
    if any(row.metric == "counted" for row in own):
        says += " Counted: the operators and the Python that the frozen model does not run."
    table = peers_by(own, lambda row: model_label(row, own), overhead)
    return "\n\n".join(
        [" ".join(machine_lines(own)), says + (f" All: {common}." if common else ""), table]
    )


def rewrite(path: Path, table: str) -> None:
    """Put a table between the two markers of a page.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    text = path.read_text(encoding="utf-8")
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, once each and in this order")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    path.write_text(f"{head}{BEGIN}\n{table}\n{tail}", encoding="utf-8")
