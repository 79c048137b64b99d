"""GLUE metrics against scikit-learn and SciPy, which the metric on the hub calls."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft.paper.tasks import metrics

CLASSES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
VALUES = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.floats(0, 5, width=32)), min_size=2, max_size=40
)


@settings(deadline=None, max_examples=80)
@given(CLASSES)
def test_classes(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = (np.array(column) for column in zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "accuracy": sklearn.accuracy_score(labels, predictions),
            "f1": sklearn.f1_score(labels, predictions, zero_division=0),
            "matthews_correlation": sklearn.matthews_corrcoef(labels, predictions),
        }
    for name, value in wanted.items():
        assert metrics.compute(name, predictions, labels)[name] == pytest.approx(value, abs=1e-12)


@settings(deadline=None, max_examples=80)
@given(VALUES)
def test_values(pairs):
    stats = pytest.importorskip("scipy.stats")
    predictions, labels = (
        np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "pearson": stats.pearsonr(predictions, labels)[0],
            "spearman": stats.spearmanr(predictions, labels)[0],
        }
    for name, value in wanted.items():
        actual = metrics.METRICS[name](predictions, labels)
        # For nearly constant values, both results are rounding errors.
        if math.isnan(actual) or min(np.ptp(predictions), np.ptp(labels)) < 1e-3:
            continue
        assert actual == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("name", ["pearson", "spearman", "matthews_correlation"])
def test_a_constant_has_learnt_nothing(name):
    """It is never the best epoch; a NaN in the first epoch would be."""
    assert metrics.compute(name, [1, 1, 1], [0, 1, 1]) == {name: 0.0}


def test_ties_share_their_rank():
    assert metrics.compute("spearman", [1, 2, 2, 3], [1, 2, 3, 4])["spearman"] == pytest.approx(
        3 / math.sqrt(10)
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("mathews", [1], [1]), r"metric must be one of accuracy, .*'mathews'"),
        (("accuracy", [1, 2], [1]), r"two vectors of the same length.*\(2,\) and \(1,\)"),
        (("accuracy", [], []), r"at least 1"),
        (("accuracy", [[1]], [[1]]), r"two vectors"),
    ],
)
def test_mistakes(arguments, match):
    with pytest.raises(ValueError, match=match):
        metrics.compute(*arguments)
