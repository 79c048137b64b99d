"""The measured part of docs/serving.md, from rows of the suite "serve"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.machine import ROOT
from benchmarks.report.plots.serve import adapters
from benchmarks.report.tables import constants, markdown, missing, quantity
from benchmarks.result_rows import Row

PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- serving table -->", "<!-- end of serving table -->"


def table(rows: Sequence[Row], machine: Sequence[str]) -> str:
    """What stands between the markers.

    Args:
        rows: of the suite.
        machine: what they were measured on, in words.

    Raises:
        ValueError: there are none.
    """
    own = [row for row in rows if row.suite == "serve"]
    if not own:
        raise ValueError("the page's table is of the suite serve, and there are no rows of it")
    found = {(row.peer, _where(row), row.shape["adapters"], row.metric): row for row in own}
    lines = []
    for peer, where, count in dict.fromkeys(key[:3] for key in found):
        metrics = {key[3]: row for key, row in found.items() if key[:3] == (peer, where, count)}
        if peer == "base" or metrics.get("prefill") is None or metrics["prefill"].value is None:
            continue
        line = [peer, *where, "one at a time" if peer == "pyreft" else f"{count}"]
        counted, one = (
            metrics.get("prefill_counted"),
            found.get((peer, where, 1, "prefill_counted")),
        )
        line.append(_ratio(counted, 3))
        over = None
        if counted is not None and one is not None and count > 1:
            over = (counted.value or 0.0) / (one.value or 1.0)
        line.append("" if over is None else f"{over:.3f}")
        line += [_ratio(metrics.get("prefill"), 2), _value(metrics.get("prefill_over_one"))]
        more = metrics.get("decode_operations")
        line.append("" if more is None else quantity(more.value or 0.0, "count"))
        line += [_ratio(metrics.get("decode_counted"), 3), _ratio(metrics.get("decode"), 2)]
        line.append(_value(metrics.get("decode_over_one")))
        lines.append(line)
    head = ["peer", "positions", "rank", "adapters"]
    head += ["prefill over the base, counted", "over one adapter, counted"]
    head += ["prefill over the base, timed", "over one adapter, timed"]
    head += ["decoding: operators more", "decoding over the base, counted"]
    head += ["decoding over the base, timed", "over one adapter, timed"]
    base = [row for row in own if row.peer == "base" and row.value is not None]
    seconds = {
        metric: min(row.value or 0.0 for row in base if row.metric == metric)
        for metric in ("prefill", "decode")
    }
    operators = ""
    if any(row.metric == "decode_operations" for row in own):
        operators = "*Operators more*: those that a step of decoding dispatches beyond the base's. "
    common = constants(own, ("positions", "rank", "adapters", "sweep", "edited"))
    says = (
        f"`python -m benchmarks run serve`. {' '.join(machine)} All: {common}. Numbers are ratios, "
        "medians over rounds in turns. *Timed*: whole forwards, on a machine that others use "
        f"too. {_noise(own)}*Counted*: the time of the base and of the operators and the Python "
        f"that it does not run. {operators}The base itself takes "
        f"{quantity(seconds['prefill'], 's')} for the prompts and "
        f"{quantity(seconds['decode'], 's')} for a step of the whole batch. "
        "LoRA has rank 8 on q and v, whatever the rank of the line it is beside. vLLM has no line: "
        "it would be timed on a GPU, and none was used."
    )
    notes = dict.fromkeys(
        f"{row.peer}: {row.note}."
        for row in own
        if row.note and row.peer == "pyreft" and row.value is not None
    )
    left_out = missing([row for row in own if row.value is None])
    shown = [at for at in range(len(head)) if any(line[at] for line in lines)]
    whole = markdown([head[at] for at in shown], [[line[at] for at in shown] for line in lines], 2)
    parts = [says, "![Many adapters](serving.png)", whole, *notes, *left_out]
    return "\n\n".join([*parts, *_memory(own)])


def _noise(rows: Sequence[Row]) -> str:
    """How far the base's own work, measured again, is from the base."""
    again = [
        row.ratio
        for row in rows
        if row.peer == "ours" and row.shape["adapters"] == 0 and row.ratio is not None
        if row.metric in ("prefill", "decode")
    ]
    if not again:
        return ""
    return (
        "0 adapters is the base's own work measured again, the noise: "
        f"{min(again):.2f} to {max(again):.2f}. "
    )


def _memory(rows: Sequence[Row]) -> list[str]:
    """Bytes an adapter takes, beside what its numbers need."""
    measured = [row for row in rows if row.metric == "memory"]
    host = {row.case: row for row in rows if row.metric == "host_memory"}
    lines = []
    for row in measured:
        shape = row.shape
        numbers = (2 * shape["hidden"] + 1) * shape["rank"] * shape["edited"]
        line = [str(shape["positions"]), str(shape["rank"])]
        line += [f"{round(one.value or 0.0):,}" for one in (row, host[row.case])]
        lines.append([*line, f"{4 * numbers:,}"])
    if not lines:
        return []
    says = f"Bytes an adapter takes, {measured[0].shape['adapters']} of them being resident:"
    head = ["positions", "rank", "on the device", "on the host", "4 · L · (2·r·D + r)"]
    return [says, markdown(head, lines, 1)]


def _ratio(row: Row | None, digits: int) -> str:
    return "" if row is None or row.ratio is None else f"{row.ratio:.{digits}f}"


def _value(row: Row | None) -> str:
    return "" if row is None or row.value is None else f"{row.value:.2f}"


def write_page(rows: Sequence[Row], machine: Sequence[str], page: Path = PAGE) -> Path:
    """Fill the page and draw its plot beside it.

    Raises:
        ValueError: no rows, or the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    if (text.count(BEGIN), text.count(END)) != (1, 1):
        raise ValueError(f"{page} needs the lines {BEGIN} and {END}, once each")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{head}{BEGIN}\n{table(rows, machine)}\n{tail}", encoding="utf-8")
    drawn = [row for row in rows if row.suite == "serve" and row.ratio is not None]
    FigureCanvasAgg(adapters(drawn)).print_png(page.with_name("serving.png"))
    return page


def _where(row: Row) -> tuple[str, str]:
    return str(row.shape["positions"]), str(row.shape["rank"])
