"""Metrics of GLUE in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


def accuracy(predictions: Array, labels: Array) -> float:
    """Return the share of equal pairs."""
    return float(np.mean(predictions == labels))


def f1(predictions: Array, labels: Array) -> float:
    """Return 2 TP / (2 TP + FP + FN) of class 1; 0 if that is 0 / 0."""
    predicted, expected = predictions == 1, labels == 1
    total = predicted.sum() + expected.sum()
    return float(2 * (predicted & expected).sum() / total) if total else 0.0


def matthews_correlation(predictions: Array, labels: Array) -> float:
    """Return the correlation of two binary variables; 0 if one of them is constant."""
    return _correlation(predictions == 1, labels == 1, constant=0.0)


def pearson(predictions: Array, labels: Array) -> float:
    """Return the linear correlation; NaN if one of the variables is constant."""
    return _correlation(predictions, labels, constant=np.nan)


def spearman(predictions: Array, labels: Array) -> float:
    """Return the correlation of ranks, where equal values share their mean rank."""
    return _correlation(_ranks(predictions), _ranks(labels), constant=np.nan)


METRICS: Mapping[str, Callable[[Array, Array], float]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "matthews_correlation": matthews_correlation,
        "pearson": pearson,
        "spearman": spearman,
    }
)


def compute(name: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compute a metric of :data:`METRICS`.

    The correlation with a constant is NaN. It is returned as 0, so that an epoch with constant
    predictions is never chosen as the best.

    Raises:
        ValueError: the metric is unknown, the vectors differ in length, or they are empty.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {name!r}")
    first, second = np.asarray(predictions), np.asarray(labels)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            "predictions and labels must be two vectors of the same length, at least 1; got shapes "
            f"{first.shape} and {second.shape}"
        )
    value = METRICS[name](first, second)
    return {name: 0.0 if np.isnan(value) else value}


def _correlation(first: Array, second: Array, constant: float) -> float:
    a, b = first.astype(np.float64), second.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else constant


def _ranks(values: Array) -> Array:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[places]
