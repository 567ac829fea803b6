from __future__ import annotations

import json

import numpy as np
import pytest

from iumad.metrics import ResultMatrix


def filled(steps, columns):
    """A matrix from ``{class: values from the step that learned it on}``."""
    matrix = ResultMatrix(steps)
    for first, step in enumerate(steps):
        for cls in step:
            for offset, value in enumerate(columns[cls]):
                matrix.record(first + offset, cls, {"m": value})
    return matrix


@pytest.fixture
def run():
    # a dips and recovers, b rises above where it began, c falls, d is new
    return filled(
        [("a", "b"), ("c",), ("d",)],
        {"a": [0.9, 0.6, 0.8], "b": [0.5, 0.7, 0.8], "c": [0.9, 0.5], "d": [0.95]},
    )


def test_matrix_layout(run):
    expected = [[0.9, 0.5, np.nan, np.nan], [0.6, 0.7, 0.9, np.nan], [0.8, 0.8, 0.5, 0.95]]
    np.testing.assert_array_equal(run.values("m"), expected)
    assert run.classes == ("a", "b", "c", "d")
    assert run.metrics == ("m",)
    assert run.last_step == 2


def test_every_definition_by_hand(run):
    # best earlier - last: a .9-.8, b .7-.8 (negative), c .9-.5
    assert run.forgetting_measure("m") == pytest.approx((0.1 - 0.1 + 0.4) / 3)
    assert run.forgetting_measure("m", over="all") == pytest.approx(0.4 / 4)
    # first - last: a .9-.8, b .5-.8, c .9-.5
    assert run.first_minus_last("m") == pytest.approx((0.1 - 0.3 + 0.4) / 3)
    assert run.backward_transfer("m") == pytest.approx(-(0.1 - 0.3 + 0.4) / 3)
    assert run.final_mean("m") == pytest.approx((0.8 + 0.8 + 0.5 + 0.95) / 4)
    assert run.average_incremental("m") == pytest.approx((0.7 + (0.6 + 0.7 + 0.9) / 3 + 0.7625) / 3)


def test_after_an_earlier_step(run):
    assert run.forgetting_measure("m", after=1) == pytest.approx((0.3 - 0.2) / 2)
    assert run.final_mean("m", after=0) == pytest.approx(0.7)
    assert run.summary("m", after=2) == run.summary("m")


def test_forgetting_may_be_negative():
    """The paper prints FM = -0.3: old classes that improved."""
    matrix = filled([("a",), ("b",)], {"a": [0.800, 0.803], "b": [0.9]})
    assert 100 * matrix.forgetting_measure("m") == pytest.approx(-0.3)


def test_one_step_run_has_no_forgetting():
    matrix = filled([("a", "b")], {"a": [0.9], "b": [0.7]})
    assert np.isnan(matrix.forgetting_measure("m"))
    assert np.isnan(matrix.backward_transfer("m"))
    assert matrix.final_mean("m") == matrix.average_incremental("m") == pytest.approx(0.8)


def test_missing_value_shows():
    matrix = filled([("a", "b"), ("c",)], {"a": [0.9, 0.8], "b": [np.nan, 0.5], "c": [0.9]})
    assert np.isnan(matrix.forgetting_measure("m"))
    assert matrix.final_mean("m") == pytest.approx((0.8 + 0.5 + 0.9) / 3)


def test_round_trip_through_json(run):
    copy = ResultMatrix.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(copy.values("m"), run.values("m"))
    assert copy.summary("m") == run.summary("m")
    assert copy.to_dict() == run.to_dict()


def test_errors(run):
    with pytest.raises(ValueError, match="'d' is learned in step 2"):
        run.record(1, "d", {"m": 0.5})
    with pytest.raises(ValueError, match="cls is 'e'"):
        run.record(1, "e", {"m": 0.5})
    with pytest.raises(ValueError, match="metric is 'x', expected one of m"):
        run.values("x")
    with pytest.raises(ValueError, match="a more than once"):
        ResultMatrix([("a",), ("a",)])
    with pytest.raises(ValueError, match="at least one class"):
        ResultMatrix([("a",), ()])
    with pytest.raises(ValueError, match="expected a recorded step"):
        run.final_mean("m", after=3)
    with pytest.raises(ValueError, match="over is 'new'"):
        run.forgetting_measure("m", over="new")
    with pytest.raises(ValueError, match="expected a recorded step"):
        ResultMatrix([("a",)]).final_mean("m", after=0)
    broken = run.to_dict() | {"metrics": {"m": [[1.0]]}}
    with pytest.raises(ValueError, match="has shape"):
        ResultMatrix.from_dict(broken)
