"""Results as Markdown tables: units that fit the size, what is absent and why below each table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.result_rows import Row

#: Peers as they follow one another in tables and plots; unknown ones come last.
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
NONE, MINUS = "–", "−"
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHORT = {"dim": "D", "sequence": "length", "edited": "edited layers"}


# ------------------------------------------------------------------ numbers


def quantity(value: float, unit: str) -> str:
    """Three digits and the unit that suits them: "12.3 µs", "4.56 MB", "0 B"."""
    sign, size = (MINUS if value < 0 else ""), abs(value)
    scales = _SCALES.get(unit)
    if scales is None:
        return f"{sign}{size:,.0f}" if size == round(size) else sign + _digits(size)
    scale, name = next((pair for pair in scales if size >= 0.9995 * pair[0]), scales[-1])
    return f"{sign}{f'{size:.0f}' if name == 'B' else _digits(size / scale)} {name}"


def _digits(size: float) -> str:
    """Three of them, and none of an exponent."""
    rounded = float(f"{size:.3g}")
    after = 2 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
    return f"{size:.{after}f}"


def percent(ratio: float, unit: str = " %") -> str:
    """A ratio as what it is more than one: "+0.4 %", "−1.2 %", "+131 %"."""
    more = 100 * (ratio - 1)
    text = f"{abs(more):.{1 if abs(more) < 9.95 else 0}f}"
    sign = "" if float(text) == 0 else "+" if more > 0 else MINUS
    return f"{sign}{text}{unit}"


def times(ratio: float) -> str:
    """A ratio: "1.04×", "12.3×", "131×"."""
    return f"{_digits(ratio)}×"


# ------------------------------------------------------------------ rows


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By peer as in ``ORDER``; the cases of a peer as they came."""
    return sorted(rows, key=lambda row: ORDER.index(row.peer) if row.peer in ORDER else len(ORDER))


def by_key(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """Rows by their key.

    Raises:
        ValueError: a key has two rows, as where the results of two devices are read together.
    """
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if row.key in found:
            raise ValueError(
                f"two results for {' / '.join(row.key)}: give the folder of one device"
            )
        found[row.key] = row
    return found


def most_exact(rows: Iterable[Row]) -> list[Row]:
    """The rows that the overhead of a step is read from: of "counted" where there is one, else of
    "step"."""
    rows = list(rows)
    better = {(row.suite, row.case, row.peer) for row in rows if row.metric == "counted"}
    return [
        row for row in rows if row.metric != "step" or (row.suite, row.case, row.peer) not in better
    ]


def split_fields(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """What is equal in the shapes of all rows, and the names of the fields that are not."""
    names = list(dict.fromkeys(name for row in rows for name in row.shape))
    values = {name: {str(row.shape.get(name)) for row in rows} for name in names}
    equal = {name: rows[0].shape.get(name) for name in names if len(values[name]) == 1}
    return equal, [name for name in names if name not in equal]


def constants(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> str:
    """What all rows have in common, as a caption."""
    equal, _ = split_fields(rows)
    return fields({name: value for name, value in equal.items() if name not in leave_out})


def fields(shape: Mapping[str, Any]) -> str:
    """Fields of a shape in words: "batch 4, length 128"; those that are None are left out."""
    return ", ".join(f"{_SHORT.get(k, k)} {v}" for k, v in shape.items() if v is not None)


def model_label(row: Row, rows: Sequence[Row]) -> str:
    """A model case in few words: no more than what tells it from the other cases of ``rows``."""
    _, varying = split_fields(rows)
    labels = {one.case: _model_words(one.shape, varying) for one in (*rows, row)}
    return labels[row.case] if len(set(labels.values())) == len(labels) else row.case


def _model_words(shape: Mapping[str, Any], varying: Sequence[str]) -> str:
    said = [str(shape["model"])]
    if "batch" in shape:
        said.append(f"{shape['batch']}×{shape['sequence']} tokens")
    said += [str(shape["dtype"])] if "dtype" in varying else []
    said += [f"{name} {shape[name]}" for name in ("positions", "rank") if name in varying]
    if shape.get("edited", shape["layers"]) != shape["layers"]:
        said.append(f"last {shape['edited']} layers")
    return ", ".join(said)


def failed(row: Row) -> bool:
    """Whether there is no number to be trusted because the check before it failed."""
    return row.gate is not None and not row.gate.passed


def shown(row: Row) -> bool:
    """Whether it belongs into a table, and not only below it."""
    return row.value is not None or failed(row)


# ------------------------------------------------------------------ cells


def seconds_and_ratio(row: Row) -> str:
    """ "202 µs (1.04×)"; the baseline has no ratio."""
    text = quantity(row.value or 0.0, row.unit)
    return text if row.ratio is None or row.peer == row.baseline else f"{text} ({times(row.ratio)})"


def overhead(row: Row) -> str:
    """ "+0.4 %"; the baseline's own time."""
    if row.peer == row.baseline or row.ratio is None:
        return quantity(row.value or 0.0, row.unit)
    return percent(row.ratio)


def overhead_and_range(row: Row) -> str:
    """ "+0.4 % (−0.2 to +1.1)", the range being that of p20 to p80."""
    text = overhead(row)
    if row.peer == row.baseline or row.ratio_p20 is None or row.ratio_p80 is None:
        return text
    return f"{text} ({percent(row.ratio_p20, '')} to {percent(row.ratio_p80, '')})"


# ------------------------------------------------------------------ tables


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, its first ``left`` columns flush left, the others right."""
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def footnotes(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """Peer -> its name with the marks of its notes; and the notes."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note and shown(row)))
    marks: dict[str, set[int]] = {row.peer: set() for row in rows}
    for row in rows:
        if row.note in notes:
            marks[row.peer].add(notes.index(row.note) + 1)
    names = {
        peer: peer + "".join(f" {str(number).translate(_RAISED)}" for number in sorted(found))
        for peer, found in marks.items()
    }
    return names, [f"{str(n).translate(_RAISED)} {note}" for n, note in enumerate(notes, 1)]


def missing(rows: Sequence[Row]) -> list[str]:
    """A line for every reason why a peer has no number, gates that failed first."""
    gates, others = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        if failed(row) and row.gate is not None:
            gates[row.peer, row.gate.says] += 1
        elif row.value is None:
            others[row.peer, row.absent or "no reason was written down"] += 1
    total = Counter(row.peer for row in rows)
    return [
        f"{mark}{peer}: {says}" + (f" ({count} of {total[peer]})" if count < total[peer] else "")
        for mark, found in (("**failed**: ", gates), (f"{NONE} ", others))
        for (peer, says), count in found.items()
    ]


def pivot(
    rows: Sequence[Row],
    stub: Sequence[str],
    line: Callable[[Row], Sequence[str]],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
    last: tuple[str, Mapping[str, str]] | None = None,
) -> str:
    """A table of one cell a row; lines and columns without any number or failure are left out.

    Args:
        rows: in the order of lines and columns.
        stub: heads of the columns that say what a line is.
        line, column: where a row belongs.
        cell: what stands there, of a row with a number.
        last: head of a last column, and its cells by case.
    """
    there = [row for row in rows if shown(row)]
    lines = dict.fromkeys(tuple(line(row)) for row in there)
    columns = dict.fromkeys(column(row) for row in there)
    found = {
        (tuple(line(row)), column(row)): (
            "**failed**" if failed(row) else NONE if row.value is None else cell(row)
        )
        for row in rows
    }
    if last is not None and any(last[1].values()):
        head, texts = last
        columns[head] = None
        found |= {(tuple(line(row)), head): texts.get(row.case, "") for row in there}
    return markdown(
        [*stub, *columns],
        [[*key, *(found.get((key, one), "") for one in columns)] for key in lines],
        len(stub),
    )


def cases_by_peer(
    rows: Sequence[Row],
    cell: Callable[[Row], str],
    last: tuple[str, Mapping[str, str]] | None = None,
) -> str:
    """Cases below one another, told apart by what differs; peers beside one another."""
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
    """Peers below one another; beside one another whatever ``column`` says."""
    rows = in_order(rows)
    names, notes = footnotes(rows)
    table = pivot(rows, ["peer"], lambda row: [names[row.peer]], column, cell)
    return _with_notes(table, rows, notes)


def _with_notes(table: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    below = [*missing(rows), *notes]
    return "\n\n".join([table, "  \n".join(below)] if below else [table])
