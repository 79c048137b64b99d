"""Handwritten rows for tests of compare, report and plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.result_rows import Row

MACHINE = {
    "device": "Slow CPU",
    "kind": "cpu",
    "driver": None,
    "threads": 1,
    "cores": 2,
    "platform": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "transformers": "5.23.0",
    "commit": "0123456789ab",
}
MODEL = {
    "model": "Llama 64x2",
    "hidden": 64,
    "layers": 2,
    "batch": 2,
    "sequence": 32,
    "positions": "f7+l7",
    "rank": 4,
    "dtype": "fp32",
    "sweep": None,
    "edited": 2,
}


def row(**changes: Any) -> Row:
    """A row of the op suite with changes; p20 and p80 are 1 % around the value by default."""
    plain = Row(
        suite="op",
        case="a",
        metric="forward",
        shape={"positions": "all", "rows": 8, "dim": 64, "rank": 4},
        peer="ours",
        version=None,
        unit="s",
        value=1e-3,
        machine=MACHINE,
        when="2026-02-03T04:05:06+00:00",
    )
    made = dataclasses.replace(plain, **changes)
    if made.value is None or made.unit != "s" or made.p20 is not None:
        return made
    return dataclasses.replace(made, p20=0.99 * made.value, p80=1.01 * made.value)


def step(peer: str, ratio: float | None, spread: float = 0.01, **changes: Any) -> Row:
    """A row of the step suite with a ratio to a baseline of 200 ms; None means no number."""
    shape = MODEL | changes.pop("shape", {})
    fields: dict[str, Any] = {
        "suite": "step",
        "metric": "step",
        "case": "-".join(str(value) for value in shape.values()),
        "shape": shape,
        "peer": peer,
        "value": None if ratio is None else 0.2 * ratio,
        "ratio": ratio,
        "ratio_p20": None if ratio is None else ratio - spread,
        "ratio_p80": None if ratio is None else ratio + spread,
        "baseline": "frozen",
    }
    return row(**fields | changes)


def write(path: Path, *rows: Row) -> Path:
    """Write a file of these rows."""
    path.write_text("".join(each.as_json() + "\n" for each in rows), encoding="utf-8")
    return path


def op_rows() -> list[Row]:
    """Forward rows of two cases; the compiled peer is absent in the second."""
    small = {"positions": "all", "rows": 8, "dim": 64, "rank": 4}
    large = small | {"dim": 128}
    work = {"bytes": 1000, "flops": 2000, "bandwidth": 4e6, "baseline": "ours"}
    return [
        row(case="s", shape=small, ratio=1.0, **work),
        row(case="s", shape=small, peer="pyreft", version="0.1.0", value=3e-3, ratio=3.0, **work),
        row(case="s", shape=small, peer="reference, compiled", value=4e-5, ratio=0.04, **work),
        row(case="l", shape=large, value=2e-3, ratio=1.0, **work),
        row(case="l", shape=large, peer="pyreft", version="0.1.0", value=0.5, ratio=250.0, **work),
        row(case="l", shape=large, peer="reference, compiled", value=None, absent="no compiler"),
    ]


def step_rows() -> list[Row]:
    """Rows of two models; a peer is absent in the second."""
    wide = {"shape": {"model": "Llama 128x2", "hidden": 128}}
    return [
        step("frozen", 1.0),
        step("frozen again", 0.998, note="the baseline again"),
        step("ours", 1.004, 0.002),
        step("pyreft", 2.31, version="0.1.0"),
        step("frozen", 1.0, value=0.04, **wide),
        step("frozen again", 1.0, note="the baseline again", **wide),
        step("ours", 1.0949, **wide),
        step("pyreft", None, version="0.1.0", absent="it fails here", **wide),
    ]


def sweep_rows() -> list[Row]:
    """Rows of four peers in three families of cases."""
    return [
        step(peer, 1 + more * value / 8, shape={"sweep": sweep, field: value})
        for sweep, field, values in (
            ("rank", "rank", (1, 8, 32)),
            ("layers", "edited", (1, 2)),
            ("sequence", "sequence", (32, 64)),
        )
        for value in values
        for peer, more in (("frozen", 0), ("frozen again", 0.001), ("ours", 0.01), ("pyreft", 0.5))
    ]


def serve_rows(rank: int = 2) -> list[Row]:
    """Rows of the base, this library with 0, 1 and 8 adapters, LoRA and pyreft."""
    rows = []
    for peer, adapters in (("base", 0), ("ours", 0), ("ours", 1), ("ours", 8), ("LoRA", 1)):
        metrics = ["prefill", "decode"]
        metrics += ["prefill_over_one", "decode_over_one"] * (adapters > 1)
        if peer == "ours":
            metrics += ["prefill_op_overhead", "decode_op_overhead", "decode_operations"]
        rows += [_serve_row(peer, adapters, metric, rank) for metric in metrics]
    note = "one request at a time: the time of a request times the number of requests"
    pyreft = _serve_row("pyreft", 1, "prefill", rank)
    rows.append(dataclasses.replace(pyreft, value=3.0, ratio=6.0, note=note))
    for metric in ("memory", "host_memory"):
        size = MODEL["layers"] * (2 * MODEL["hidden"] + 1) * rank * 4
        memory = _serve_row("ours", 8, metric, rank)
        rows.append(dataclasses.replace(memory, unit="bytes", value=size, ratio=None))
    return rows


def _serve_row(peer: str, adapters: int, metric: str, rank: int) -> Row:
    shape = MODEL | {"positions": "f3+l3", "rank": rank, "adapters": adapters}
    ratio = None if metric.endswith("over_one") else 1.0 + adapters / 100
    value = {"decode_operations": 0.0}.get(metric, 0.5)
    case = f"{rank}-k{adapters}"
    return row(
        suite="serve", case=case, metric=metric, shape=shape, peer=peer, value=value, ratio=ratio,
        baseline="base",
    )  # fmt: skip


def page_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown page: a list of lines each, a list of cells per line."""
    parsed: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            parsed[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif parsed[-1]:
            parsed.append([])
    return [table for table in parsed if table]
