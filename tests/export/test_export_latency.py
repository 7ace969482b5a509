"""`measure`: structure and consistency of a latency. No test asserts a time."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import export
from export.candidates import Candidate
from export.latency import Settings, environment_warnings, summarise
from export.rounds import Rounds


def test_a_latency_is_consistent(files):
    latency = export.measure(files["small"].path, seconds=0.3, batch=np.int64(2))  # JSON knows no such number
    assert 0 < latency.low <= latency.median <= latency.high
    assert latency.median == pytest.approx(float(np.median(latency.samples)))
    assert len(latency.samples) >= 100
    assert latency.p90 == pytest.approx(float(np.quantile(latency.samples, 0.9)))
    assert latency.throughput == pytest.approx(2000 / latency.median)
    assert (latency.device, latency.threads, latency.batch) == ("cpu", 1, 2)
    assert json.loads(json.dumps(latency.as_dict(), allow_nan=False))["samples"] == list(latency.samples)
    assert f"{latency.median:.3g} ms" in str(latency)


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(63, False, False), (64, True, False), (661, True, False), (662, True, True)]
)
def test_quantiles_are_shown_from_their_floors_on(count, p90, p99):
    found = summarised(np.linspace(1, 2, count))
    assert (found.p90 is not None, found.p99 is not None) == (p90, p99)
    assert found.as_dict()["p99"] == found.p99


def test_an_interval_too_wide_to_be_of_use_is_called_that():
    draw = np.random.default_rng(0)
    steady, wild = (summarised(np.exp(width * draw.standard_normal(100))) for width in (0.01, 2))
    assert steady.warnings == ()
    (text,) = wild.warnings
    assert text.startswith("too noisy to measure")
    assert f"{wild.low:.3g} to {wild.high:.3g}" in text


def summarised(samples):
    candidate = Candidate(lambda: None, (), "fp32")
    return summarise(samples, export.this_machine(), Settings("cpu", 1, 1, 0), 1, (), candidate)


ONE = Settings("cpu", 1, 1, 0)


def rounds(count, busy=1.0):
    return Rounds(np.ones((1, count)), (1,), busy)


def test_warnings_tell_load_and_too_few_rounds():
    quiet = replace(export.this_machine(), cores=2.0, load_before=0.9)
    assert environment_warnings(quiet, rounds(100), ONE) == ()
    assert "load 1.1 on 2 usable cores" in environment_warnings(replace(quiet, load_before=1.1), rounds(100), ONE)[0]
    assert "only 30 rounds instead of 100" in environment_warnings(quiet, rounds(30), ONE)[0]
    assert environment_warnings(replace(quiet, load_before=None), rounds(100), ONE) == ()
    (text,) = environment_warnings(quiet, rounds(100, busy=0.5), ONE)
    assert "other work had the core for 50% of the time" in text
    assert "all took 2 times as long" in text
    assert environment_warnings(quiet, rounds(100, busy=0.5), replace(ONE, threads=2)) == ()
    assert environment_warnings(quiet, rounds(100), replace(ONE, threads=64)) == (
        "64 threads take turns on 2 usable cores",
    )


def test_a_file_that_loads_but_does_not_run_is_refused(files, tmp_path):
    """The declared input is too small for the weights behind it, which onnxruntime notices only when it runs."""
    shape = helper.make_node("Reshape", ["input", "wanted"], ["y"])
    graph = helper.make_graph(
        [shape], "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("wanted", TensorProto.INT64, [2], [7, -1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(export.BadOnnx, match="cannot run the file"):
        export.measure(tmp_path / "m.onnx", seconds=0.1)
    with pytest.raises(export.BadOnnx, match="cannot run the file"):
        export.layers_of(tmp_path / "m.onnx")
