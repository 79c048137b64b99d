"""The metrics of GLUE, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


def accuracy(predictions: Array, labels: Array) -> float:
    """The share of equal pairs."""
    return float(np.mean(predictions == labels))


def f1(predictions: Array, labels: Array) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where that is 0 / 0."""
    positive, wanted = predictions == 1, labels == 1
    total = positive.sum() + wanted.sum()
    return float(2 * (positive & wanted).sum() / total) if total else 0.0


def matthews_correlation(predictions: Array, labels: Array) -> float:
    """Correlation of two binary variables; 0 where one of them is constant."""
    return _correlation(predictions == 1, labels == 1, constant=0.0)


def pearson(predictions: Array, labels: Array) -> float:
    """Linear correlation; nan where one of the two is constant."""
    return _correlation(predictions, labels, constant=np.nan)


def spearman(predictions: Array, labels: Array) -> float:
    """Correlation of ranks, equal values sharing theirs."""
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
    """One metric of :data:`METRICS`.

    A correlation with a constant is no number. It counts as 0 here, "nothing learnt", so that an
    epoch in which a model predicts a constant is never the best one.

    Raises:
        ValueError: no such metric; not as many predictions as labels, or none.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {name!r}")
    first, second = np.asarray(predictions), np.asarray(labels)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            "predictions and labels must be two vectors of one length, at least 1; got shapes "
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
