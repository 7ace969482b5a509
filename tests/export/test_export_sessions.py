"""Files that cannot be opened, devices that are not there."""

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import export
from export.sessions import open_session


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(files, tmp_path, kept):
    content = files["small"].path.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(export.BadOnnx, match="cannot load the file"):
        export.measure(path, seconds=0.1)


def test_a_file_that_is_not_onnx_is_refused(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("not a network at all")
    with pytest.raises(export.BadOnnx, match="cannot load the file"):
        export.measure(path, seconds=0.1)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(export.BadOnnx, match="no such file"):
            export.measure(path, seconds=0.1)


def test_an_unknown_operator_is_refused(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Teleport", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(export.BadOnnx, match="Teleport"):
        export.measure(tmp_path / "m.onnx", seconds=0.1)


def test_a_missing_device_is_never_replaced_by_another(files, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = files["small"].path
    with pytest.raises(export.DeviceMissing, match="runs on cpu only, asked was cuda"):
        export.measure(path, device="cuda")
    with pytest.raises(export.DeviceMissing, match="runs on cpu only, asked was cuda"):
        export.compare(path, path, device="cuda")


def test_a_session_that_fell_back_is_refused(files, monkeypatch):
    """onnxruntime may name a provider, fail to load its libraries and go on with the CPU, without an exception."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: real(path, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(export.DeviceMissing, match="fell back to CPUExecutionProvider"):
        open_session(files["small"].path, device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "use one of 'cpu', 'cuda'"),
        ({"threads": 0}, "0 threads asked"),
        ({"batch": 0}, "batch 0 asked"),
        ({"seconds": 0.0}, r"0\.0 seconds asked"),
        ({"seconds": float("nan")}, "nan seconds asked"),
    ],
)
def test_impossible_options_are_refused(files, options, message):
    with pytest.raises(export.CannotMeasure, match=message):
        export.measure(files["small"].path, **options)
    with pytest.raises(export.CannotMeasure, match=message):
        export.compare(files["dense"].path, files["small"].path, **options)


def test_several_threads_do_not_spin(files):
    spinning = "session.intra_op.allow_spinning"
    assert open_session(files["small"].path, threads=2).get_session_options().get_session_config_entry(spinning) == "0"
    options = open_session(files["small"].path).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
