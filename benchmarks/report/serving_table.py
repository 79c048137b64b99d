"""The measured section of docs/serving-cost.md, from rows of the suite "serve"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.report.conditions import measured_on
from benchmarks.report.number_format import quantity
from benchmarks.report.tables import common_fields, markdown, missing_lines
from benchmarks.result_rows import Row

_HEAD = (
    "peer",
    "positions",
    "rank",
    "adapters",
    "prefill ÷ base, operators",
    "÷ one adapter, operators",
    "prefill ÷ base, timed",
    "÷ one adapter, timed",
    "decoding: added operators",
    "decoding ÷ base, operators",
    "decoding ÷ base, timed",
    "÷ one adapter, timed",
)


def serving_section(rows: Sequence[Row]) -> str:
    """Write conditions, plot, table and memory of the suite.

    Args:
        rows: rows of this suite and of others, which are ignored.

    Raises:
        ValueError: there are no rows of the suite.
    """
    rows = [row for row in rows if row.suite == "serve"]
    if not rows:
        raise ValueError("docs/serving-cost.md needs rows of the suite serve, got none")
    notes = dict.fromkeys(
        f"{row.peer}: {row.note}."
        for row in rows
        if row.note and row.peer == "pyreft" and row.value is not None
    )
    parts = [_conditions(rows), "![Several adapters in one batch](serving.png)", _table(rows)]
    parts += [*notes, *missing_lines([row for row in rows if row.value is None]), *_memory(rows)]
    return "\n\n".join(parts)


def _conditions(rows: Sequence[Row]) -> str:
    base = [row for row in rows if row.peer == "base" and row.value is not None]
    prefill, decode = (
        quantity(min(row.value or 0.0 for row in base if row.metric == metric), "s")
        for metric in ("prefill", "decode")
    )
    operators = ""
    if any(row.metric == "decode_operations" for row in rows):
        operators = "*Added operators*: those that a decoding step dispatches beyond the base's. "
    common = common_fields(rows, ("positions", "rank", "adapters", "sweep", "edited"))
    return (
        f"`python -m benchmarks run serve`. {' '.join(measured_on(rows))} All: {common}. Numbers "
        "are ratios: medians over interleaved rounds. *Timed*: whole forwards, on a machine "
        f"shared with other work. {_noise(rows)}*Operators*: the time of the base plus that of the "
        f"operators and the Python that the base does not run. {operators}The base itself takes "
        f"{prefill} for the prompts and {decode} for a decoding step of the whole batch. "
        "LoRA has rank 8 on q and v, whatever the rank of its line. vLLM has no line, since it has "
        "to be timed on a GPU and none was used."
    )


def _table(rows: Sequence[Row]) -> str:
    """A line per peer, positions, rank and number of adapters; empty columns are left out."""
    by_line: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for row in rows:
        line = (row.peer, *_positions_and_rank(row), row.shape["adapters"])
        by_line.setdefault(line, {})[row.metric] = row
    lines = [
        _line(line, metrics, by_line.get((*line[:3], 1), {}))
        for line, metrics in by_line.items()
        if line[0] != "base" and "prefill" in metrics and metrics["prefill"].value is not None
    ]
    columns = [column for column in range(len(_HEAD)) if any(line[column] for line in lines)]
    return markdown(
        [_HEAD[column] for column in columns],
        [[line[column] for column in columns] for line in lines],
        2,
    )


def _line(
    line: tuple[str, str, str, int], metrics: Mapping[str, Row], one_adapter: Mapping[str, Row]
) -> list[str]:
    peer, positions, rank, adapters = line
    operations = metrics.get("decode_operations")
    overhead, single = (of.get("prefill_op_overhead") for of in (metrics, one_adapter))
    over_one = ""
    if overhead is not None and single is not None and adapters > 1:
        over_one = f"{(overhead.value or 0.0) / (single.value or 1.0):.3f}"
    return [
        peer,
        positions,
        rank,
        "one at a time" if peer == "pyreft" else f"{adapters}",
        _ratio(overhead, 3),
        over_one,
        _ratio(metrics.get("prefill"), 2),
        _value(metrics.get("prefill_over_one")),
        "" if operations is None else quantity(operations.value or 0.0, "count"),
        _ratio(metrics.get("decode_op_overhead"), 3),
        _ratio(metrics.get("decode"), 2),
        _value(metrics.get("decode_over_one")),
    ]


def _noise(rows: Sequence[Row]) -> str:
    """The range of ratios without any adapter, which repeat the work of the base."""
    ratios = [
        row.ratio
        for row in rows
        if row.peer == "ours" and row.shape["adapters"] == 0 and row.ratio is not None
        if row.metric in ("prefill", "decode")
    ]
    if not ratios:
        return ""
    return (
        "0 adapters repeats the work of the base and shows the noise: "
        f"{min(ratios):.2f} to {max(ratios):.2f}. "
    )


def _memory(rows: Sequence[Row]) -> list[str]:
    """A table of the bytes per adapter, beside the size of its parameters."""
    measured = [row for row in rows if row.metric == "memory"]
    host = {row.case: row for row in rows if row.metric == "host_memory"}
    lines = []
    for row in measured:
        shape = row.shape
        parameters = (2 * shape["hidden"] + 1) * shape["rank"] * shape["edited"]
        line = [str(shape["positions"]), str(shape["rank"])]
        line += [f"{round(memory.value or 0.0):,}" for memory in (row, host[row.case])]
        lines.append([*line, f"{4 * parameters:,}"])
    if not lines:
        return []
    caption = f"Bytes per adapter, with {measured[0].shape['adapters']} adapters on the device:"
    head = ["positions", "rank", "on the device", "on the host", "4 · L · (2·r·D + r)"]
    return [caption, markdown(head, lines, 1)]


def _ratio(row: Row | None, digits: int) -> str:
    return "" if row is None or row.ratio is None else f"{row.ratio:.{digits}f}"


def _value(row: Row | None) -> str:
    return "" if row is None or row.value is None else f"{row.value:.2f}"


def _positions_and_rank(row: Row) -> tuple[str, str]:
    return str(row.shape["positions"]), str(row.shape["rank"])
