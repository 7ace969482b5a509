"""`compare`: what may be claimed, and what is refused."""

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import onnx
import pytest

import export
from export.comparison import control_warnings
from export.rounds import Rounds


@pytest.fixture
def compared(files, monkeypatch):
    """Compare real files, but with given milliseconds: factors on a common, noisy load."""

    def compare(dense, control, small, rounds=300):
        load = 1 + 0.02 * np.abs(np.random.default_rng(0).standard_normal((3, rounds)))
        times = np.array([[dense], [control], [small]]) * load
        monkeypatch.setattr("export.latency.run_rounds", lambda *_, **__: Rounds(times, (1, 1, 1)))
        return export.compare(files["dense"].path, files["small"].path)

    return compare


def test_a_real_comparison_is_consistent(files):
    found = export.compare(files["dense"].path, files["small"].path, seconds=0.5)
    assert found.low <= found.speedup <= found.high
    assert found.speedup == pytest.approx(found.dense.median / found.small.median)
    assert found.noise.low <= found.noise.value <= found.noise.high
    assert len(found.dense.samples) == len(found.small.samples) >= 100
    assert found.verdict in {"faster", "slower", "no measurable difference"}
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["verdict"] == found.verdict
    assert data["dense"]["samples"] == list(found.dense.samples)
    with pytest.raises(FrozenInstanceError):
        found.speedup = 9.0


def test_twice_as_fast(compared):
    found = compared(4.0, 4.0, 2.0)
    assert found.speedup == pytest.approx(2, rel=0.03)
    assert found.verdict == "faster"
    assert str(found).startswith("2.0")
    assert "x faster (95 % interval" in str(found)


def test_twice_as_slow_is_said_as_plainly(compared):
    found = compared(2.0, 2.0, 4.0)
    assert found.speedup == pytest.approx(0.5, rel=0.03)
    assert found.verdict == "slower"
    assert "x slower (95 % interval" in str(found)


def test_no_difference_is_no_claim(compared):
    found = compared(2.0, 2.0, 2.0)
    assert found.verdict == "no measurable difference"
    assert str(found).startswith("no measurable difference")
    assert "x faster" not in str(found)


def test_less_than_the_control_shows_is_no_claim(compared):
    """1 % between dense and small is a claim if the dense file agrees with itself, and none if it is 2 % off."""
    assert compared(2.02, 2.02, 2.0).verdict == "faster"
    assert compared(2.02, 2.06, 2.0).verdict == "no measurable difference"
    assert compared(2.02, 1.98, 2.0).verdict == "no measurable difference"


def test_the_verdict_is_the_interval(compared):
    found = compared(2.0, 2.0, 2.0)
    for low, high, verdict in [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (1.0, 1.2, "no measurable difference"),
                               (0.9, 1.0, "no measurable difference"), (0.9, 1.2, "too noisy to tell"),
                               (1.2, 2.4, "faster")]:
        assert replace(found, low=low, high=high).verdict == verdict


def test_warnings_of_the_environment_are_in_all_three(compared, monkeypatch):
    busy = replace(export.this_machine(), cores=2.0, load_before=1.9)
    monkeypatch.setattr("export.latency.this_machine", lambda: busy)
    found = compared(4.0, 4.0, 2.0, rounds=40)
    for result in (found, found.dense, found.small):
        assert "load 1.9" in result.warnings[0]
        assert "only 40 rounds" in result.warnings[1]


def test_an_unsteady_control_is_warned_about():
    assert control_warnings(0.024) == ()
    assert "varies by 2.6%" in control_warnings(0.026)[0]


def test_files_with_different_inputs_are_refused(files, tmp_path):
    model = onnx.load(files["small"].path)
    model.graph.input[0].name = "pixels"
    model.graph.node[0].input[0] = "pixels"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(export.BadOnnx, match=r"different inputs: input \(1, 3, 12, 12\).* against pixels"):
        export.compare(files["dense"].path, tmp_path / "other.onnx", seconds=0.1)
