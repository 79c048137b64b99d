"""The measured part of docs/serving.md, from rows of the suite "serve"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.machine import ROOT
from benchmarks.plots.serve import adapters
from benchmarks.records import Row
from benchmarks.tables import constants, markdown, missing, quantity

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
        for metric in ("prefill", "decode"):
            counted = found.get((peer, where, count, f"{metric}_counted"))
            one = found.get((peer, where, 1, f"{metric}_counted"))
            line.append("" if counted is None else f"{counted.ratio or 0.0:.3f}")
            over = None
            if counted is not None and one is not None and count > 1:
                over = (counted.value or 0.0) / (one.value or 1.0)
            line.append("" if over is None else f"{over:.3f}")
            timed = found.get((peer, where, count, metric))
            line.append("" if timed is None or timed.ratio is None else f"{timed.ratio:.2f}")
        memory = found.get((peer, where, count, "memory"))
        line.append("" if memory is None else quantity(memory.value or 0.0, "bytes"))
        lines.append(line)
    head = ["peer", "positions", "rank", "adapters"]
    for phase in ("prefill", "decoding"):
        head += [f"{phase} over the base, counted", "over one adapter, counted", "timed"]
    head += ["bytes an adapter"]
    base = [row for row in own if row.peer == "base" and row.value is not None]
    seconds = {
        metric: min(row.value or 0.0 for row in base if row.metric == metric)
        for metric in ("prefill", "decode")
    }
    common = constants(own, ("positions", "rank", "adapters", "sweep", "edited"))
    says = (
        f"`python -m benchmarks run serve`. {' '.join(machine)} All: {common}. Numbers are ratios, "
        "medians over rounds in turns. *Timed*: whole forwards, which on this shared machine "
        "differ by ten percent from themselves. *Counted*: the time of the base and of the "
        "operators and the Python that it does not run. The base itself takes "
        f"{quantity(seconds['prefill'], 's')} for the prompts and "
        f"{quantity(seconds['decode'], 's')} for a step of the whole batch. "
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
