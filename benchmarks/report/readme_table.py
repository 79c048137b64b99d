"""README's benchmark table: the overhead of a training step by peer and model."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.conditions import measured_on
from benchmarks.report.device_report import MODEL_FIELDS
from benchmarks.report.tables import common_fields, model_label, overhead, overhead_rows, peers_by
from benchmarks.result_rows import Row


def readme_table(rows: Sequence[Row]) -> str:
    """Write the table with its conditions.

    Raises:
        ValueError: there are no rows of the step suite.
    """
    steps = overhead_rows(row for row in rows if row.suite == "step")
    steps = [row for row in steps if row.shape.get("sweep") is None]
    if not steps:
        raise ValueError("README's table needs rows of the suite step, got none")
    common = common_fields(steps, MODEL_FIELDS)
    caption = (
        "Time that a training step (forward, backward, AdamW) adds to the frozen baseline: the "
        "frozen model, whose backward is cut at the first edited block. *frozen again* is the "
        "baseline measured a second time: the noise."
    )
    if any(row.metric == "op_overhead" for row in steps):
        caption += " Only operators and Python that the frozen model does not run are timed."
    if common:
        caption += f" All: {common}."
    table = peers_by(steps, lambda row: model_label(row, steps), overhead)
    return "\n\n".join([" ".join(measured_on(steps)), caption, table])
