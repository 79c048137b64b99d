"""Result rows as Markdown tables; peers without a number are listed below, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report.number_format import NONE, percent, quantity, times
from benchmarks.result_rows import Row

#: The order of peers in tables and plots; unknown peers come last.
ORDER = (
    "frozen",
    "base",
    "frozen again",
    "ours",
    "ours, untied",
    "ours (triton)",
    "ours (torch)",
    "reference",
    "reference, compiled",
    "pyreft",
    "pyreft, untied",
    "pyreft, R given",
    "adapters",
    "adapters, untied",
    "LoRA",
)
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHORT = {"dim": "D", "sequence": "length", "edited": "edited layers"}


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sort rows by peer as in :data:`ORDER`; the cases of a peer keep their order."""
    return sorted(rows, key=lambda row: ORDER.index(row.peer) if row.peer in ORDER else len(ORDER))


def by_key(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """Map keys to rows.

    Raises:
        ValueError: two rows have the same key, as in the results of two devices.
    """
    keyed: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if row.key in keyed:
            raise ValueError(
                f"two results for {' / '.join(row.key)}: give the folder of one device"
            )
        keyed[row.key] = row
    return keyed


def overhead_rows(rows: Iterable[Row]) -> list[Row]:
    """Select the rows that give the overhead of a step.

    A row "op_overhead" replaces the row "step" of its suite, case and peer.
    """
    rows = list(rows)
    profiled = {(row.suite, row.case, row.peer) for row in rows if row.metric == "op_overhead"}
    return [
        row
        for row in rows
        if row.metric != "step" or (row.suite, row.case, row.peer) not in profiled
    ]


def split_fields(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """Fields with the same value in all shapes, and the names of the other fields."""
    names = list(dict.fromkeys(name for row in rows for name in row.shape))
    values = {name: {str(row.shape.get(name)) for row in rows} for name in names}
    equal = {name: rows[0].shape.get(name) for name in names if len(values[name]) == 1}
    return equal, [name for name in names if name not in equal]


def common_fields(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> str:
    """The fields that all rows share, as a caption."""
    equal, _ = split_fields(rows)
    return field_list({name: value for name, value in equal.items() if name not in leave_out})


def field_list(shape: Mapping[str, Any]) -> str:
    """Fields of a shape as text: "batch 4, length 128"; fields that are None are left out."""
    return ", ".join(f"{_SHORT.get(k, k)} {v}" for k, v in shape.items() if v is not None)


def model_label(row: Row, rows: Sequence[Row]) -> str:
    """A short label of a model case that distinguishes it from the other cases of ``rows``."""
    _, varying = split_fields(rows)
    labels = {each.case: _model_words(each.shape, varying) for each in (*rows, row)}
    return labels[row.case] if len(set(labels.values())) == len(labels) else row.case


def _model_words(shape: Mapping[str, Any], varying: Sequence[str]) -> str:
    words = [str(shape["model"])]
    if "batch" in shape:
        words.append(f"{shape['batch']}×{shape['sequence']} tokens")
    words += [str(shape["dtype"])] if "dtype" in varying else []
    words += [f"{name} {shape[name]}" for name in ("positions", "rank") if name in varying]
    if shape.get("edited", shape["layers"]) != shape["layers"]:
        words.append(f"last {shape['edited']} layers")
    return ", ".join(words)


def gate_failed(row: Row) -> bool:
    """Whether the check before the measurement failed, so that its number is not valid."""
    return row.gate is not None and not row.gate.passed


def has_cell(row: Row) -> bool:
    """Whether a row has a cell in a table; other rows are only listed below it."""
    return row.value is not None or gate_failed(row)


def seconds_and_ratio(row: Row) -> str:
    """A cell like "202 µs (1.04×)"; the baseline has no ratio."""
    text = quantity(row.value or 0.0, row.unit)
    return text if row.ratio is None or row.peer == row.baseline else f"{text} ({times(row.ratio)})"


def overhead(row: Row) -> str:
    """A cell like "+0.4 %"; for the baseline its time."""
    if row.peer == row.baseline or row.ratio is None:
        return quantity(row.value or 0.0, row.unit)
    return percent(row.ratio)


def overhead_and_range(row: Row) -> str:
    """A cell like "+0.4 % (−0.2 to +1.1)", with the range from p20 to p80."""
    text = overhead(row)
    if row.peer == row.baseline or row.ratio_p20 is None or row.ratio_p80 is None:
        return text
    return f"{text} ({percent(row.ratio_p20, '')} to {percent(row.ratio_p80, '')})"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are flush left, the others flush right."""
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def footnotes(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """Map each peer to its name with footnote marks; and the footnotes."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note and has_cell(row)))
    marks: dict[str, set[int]] = {row.peer: set() for row in rows}
    for row in rows:
        if row.note in notes:
            marks[row.peer].add(notes.index(row.note) + 1)
    names = {
        peer: peer + "".join(f" {str(number).translate(_RAISED)}" for number in sorted(numbers))
        for peer, numbers in marks.items()
    }
    return names, [f"{str(n).translate(_RAISED)} {note}" for n, note in enumerate(notes, 1)]


def missing_lines(rows: Sequence[Row]) -> list[str]:
    """A line per reason why a peer has no number; failed gates come first."""
    gates, others = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        if gate_failed(row) and row.gate is not None:
            gates[row.peer, row.gate.says] += 1
        elif row.value is None:
            others[row.peer, row.absent or "no reason was recorded"] += 1
    total = Counter(row.peer for row in rows)
    return [
        f"{mark}{peer}: {says}" + (f" ({count} of {total[peer]})" if count < total[peer] else "")
        for mark, reasons in (("**failed**: ", gates), (f"{NONE} ", others))
        for (peer, says), count in reasons.items()
    ]


def pivot(
    rows: Sequence[Row],
    stub: Sequence[str],
    line: Callable[[Row], Sequence[str]],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
    last: tuple[str, Mapping[str, str]] | None = None,
) -> str:
    """A table with one cell per row of results; lines and columns without a cell are left out.

    Args:
        rows: in the order of lines and columns.
        stub: heads of the columns that identify a line.
        line, column: the line and the column of a row.
        cell: the text of a row with a number.
        last: head of a last column, and its cells by case.
    """
    filled = [row for row in rows if has_cell(row)]
    lines = dict.fromkeys(tuple(line(row)) for row in filled)
    columns = dict.fromkeys(column(row) for row in filled)
    cells = {
        (tuple(line(row)), column(row)): (
            "**failed**" if gate_failed(row) else NONE if row.value is None else cell(row)
        )
        for row in rows
    }
    if last is not None and any(last[1].values()):
        head, texts = last
        columns[head] = None
        cells |= {(tuple(line(row)), head): texts.get(row.case, "") for row in filled}
    return markdown(
        [*stub, *columns],
        [[*key, *(cells.get((key, name), "") for name in columns)] for key in lines],
        len(stub),
    )


def cases_by_peer(
    rows: Sequence[Row],
    cell: Callable[[Row], str],
    last: tuple[str, Mapping[str, str]] | None = None,
) -> str:
    """A table with a line per case and a column per peer; lines show the fields that differ."""
    rows = in_order(rows)
    _, varying = split_fields(rows)
    names, notes = footnotes(rows)
    table = pivot(
        rows,
        [_SHORT.get(name, name) for name in varying] or ["case"],
        lambda row: [str(row.shape.get(name)) for name in varying] or [row.case],
        lambda row: names[row.peer],
        cell,
        last,
    )
    return _with_notes(table, rows, notes)


def peers_by(rows: Sequence[Row], column: Callable[[Row], str], cell: Callable[[Row], str]) -> str:
    """A table with a line per peer and the columns that ``column`` names."""
    rows = in_order(rows)
    names, notes = footnotes(rows)
    table = pivot(rows, ["peer"], lambda row: [names[row.peer]], column, cell)
    return _with_notes(table, rows, notes)


def _with_notes(table: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    below = [*missing_lines(rows), *notes]
    return "\n\n".join([table, "  \n".join(below)] if below else [table])
