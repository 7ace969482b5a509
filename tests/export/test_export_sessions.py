"""Files that cannot be opened, devices that are not there."""

from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import export
from export import drafts
from export.sessions import open_session

REAL = onnxruntime.InferenceSession


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
    on_a_gpu_that_is(monkeypatch, "CPUExecutionProvider", disable_fallback=False)
    with pytest.raises(export.DeviceMissing, match="fell back to CPUExecutionProvider"):
        open_session(files["small"].path, device="cuda")


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="onnxruntime has the CPU only"
)
def test_a_file_whose_operators_would_run_on_the_cpu_is_refused(files, monkeypatch):
    """The Azure provider computes nothing: onnxruntime itself refuses to leave everything to the CPU."""
    on_a_gpu_that_is(monkeypatch, "AzureExecutionProvider")
    with pytest.raises(export.CannotMeasure, match="some of the operators for the CPU only"):
        export.measure(files["small"].path, device="cuda", batch=2)


def test_on_a_gpu_the_batch_is_fixed_and_tf32_only_where_asked_for(files, monkeypatch):
    for tf32 in (False, True):
        asked = on_a_gpu_that_is(monkeypatch, "CPUExecutionProvider", disable_fallback=False)
        with pytest.raises(export.DeviceMissing):
            open_session(files["small"].path, device="cuda", batch=7, tf32=tf32)
        assert asked[-1].provider == ("CUDAExecutionProvider", {"use_tf32": str(int(tf32))})
        assert asked[-1].session.get_inputs()[0].shape == [7, 3, 12, 12]


def on_a_gpu_that_is(monkeypatch, provider, *, disable_fallback=True):
    """As if there were a GPU, which is in truth another provider; what is asked of it is noted."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    asked = []

    def session(path, options, providers, **settings):
        if providers == ["CPUExecutionProvider"]:
            return REAL(path, options, providers, **settings)
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert settings == {"enable_fallback": 0}, "else the CPU takes over, with no more than a print"
        if not disable_fallback:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        made = REAL(path, options, [provider], **settings)
        asked.append(SimpleNamespace(provider=providers[0], session=made))
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


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


def of(*nodes, opsets=("",), functions=()):
    """A file's model with input x and output y, (batch, 3), float."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", value[:1], value[1:])
    imports = [helper.make_opsetid(domain, 18 if not domain else 1) for domain in opsets]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=list(functions))


def test_operators_unknown_to_onnxruntime_are_refused_its_own_are_measured(files, tmp_path):
    for name, domain in (("Gelu", "com.microsoft"), ("Gelu", "somebody.else"), ("Wobble", "")):
        node = helper.make_node(name, ["x"], ["y"], domain=domain)
        onnx.save(of(node, opsets=("", domain) if domain else ("",)), tmp_path / f"{domain or name}.onnx")
    assert export.measure(tmp_path / "com.microsoft.onnx", seconds=0.1).median > 0
    for name in ("somebody.else", "Wobble"):
        with pytest.raises(export.BadOnnx, match=r"cannot load the file: .*\n  at .*bytes"):
            export.compare(files["dense"].path, tmp_path / f"{name}.onnx", seconds=0.1)


def test_a_data_file_that_is_missing_or_short_is_refused(tmp_path, network, image, monkeypatch):
    monkeypatch.setattr(drafts, "SINGLE_FILE_LIMIT", 1000)
    file = export.to_onnx(network, image, tmp_path / "m.onnx")
    data = tmp_path / "m.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(export.BadOnnx, match="cannot load the file"):
        export.measure(file.path, seconds=0.1)
    data.unlink()
    with pytest.raises(export.BadOnnx, match=r"the weights are in m\.onnx\.data, which is not there\n  at .*m\.onnx"):
        export.measure(file.path, seconds=0.1)


def test_a_free_axis_beside_the_batch_is_refused(tmp_path):
    model = of(helper.make_node("Relu", ["x"], ["y"]))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_param = "width"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(export.CannotMeasure, match="axis 1 of input x, width, has no fixed size"):
        export.measure(tmp_path / "m.onnx", seconds=0.1)
