"""The measured part of docs/serving.md, from rows of the suite "serve"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.machine import ROOT
from benchmarks.plots.serve import adapters
from benchmarks.records import Row
from benchmarks.tables import constants, markdown, missing, quantity, times

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
        row = found.get((peer, where, count, "prefill"))
        if row is None or row.value is None or peer == "base":
            continue
        line = [peer, *where, f"{count}" if peer != "pyreft" else "one at a time"]
        for metric in ("prefill", "prefill_over_one", "decode", "decode_over_one"):
            one = found.get((peer, where, count, metric))
            ratio = None if one is None else one.value if one.unit == "" else one.ratio
            line.append("" if ratio is None else times(ratio))
        memory = found.get((peer, where, count, "memory"))
        line.append("" if memory is None else quantity(memory.value or 0.0, "bytes"))
        lines.append(line)
    head = ["peer", "positions", "rank", "adapters", "prefill over the base", "over one adapter"]
    head += ["decoding over the base", "over one adapter", "bytes an adapter"]
    base = [row for row in own if row.peer == "base" and row.value is not None]
    seconds = {
        metric: min(row.value or 0.0 for row in base if row.metric == metric)
        for metric in ("prefill", "decode")
    }
    common = constants(own, ("positions", "rank", "adapters", "sweep", "edited"))
    says = (
        f"`python -m benchmarks run serve`. {' '.join(machine)} All: {common}. Every number is a "
        f"median of the rounds' ratios; the base itself takes {quantity(seconds['prefill'], 's')} "
        f"for the prompts and {quantity(seconds['decode'], 's')} for a step of the whole batch. "
        "LoRA has rank 8 on q and v, whatever the rank of the line it is beside."
    )
    notes = missing([row for row in own if row.value is None])
    return "\n\n".join([says, "![Many adapters](serving.png)", markdown(head, lines, 2), *notes])


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
