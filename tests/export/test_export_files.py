"""ONNX files of any exporter as candidates: several inputs, free axes, weights of any type."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny_networks import TwoInputs

import export
from export.files import stored_precision


def foreign(path, *, dtype=np.float32):
    """As other exporters write it: height and width free, a shared table as second input, names with slashes."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(dtype)
    nodes = [
        helper.make_node("Conv", ["images:0", "kernel"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"]),
        helper.make_node("Mul", ["pooled", "model/table"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes, "foreign",
        [helper.make_tensor_value_info("images:0", element, ["N", 3, "H", "W"]),
         helper.make_tensor_value_info("model/table", element, [4, 1, 1])],
        [helper.make_tensor_value_info("out", element, None)],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def test_a_foreign_file_is_measured_once_its_free_axes_are_given(tmp_path):
    path = foreign(tmp_path / "foreign.onnx")
    with pytest.raises(export.CannotMeasure, match=r"axis 2 of input images:0, H, has no fixed size(.|\n)*--input"):
        export.measure(path)
    found = export.measure(path, shapes={"images:0": (3, 9, 10)}, batch=2, seconds=0.1)
    assert [spec.shape for spec in found.inputs] == [(2, 3, 9, 10), (4, 1, 1)]
    pair = export.compare(path, path, shapes={"images:0": (3, 9, 10)}, seconds=0.1)
    assert pair.dense.inputs == pair.small.inputs


def test_several_inputs_are_fed_and_named(tmp_path):
    examples = torch.randn(2, 6), torch.tensor([1, 0])
    export.to_onnx(TwoInputs(), examples, tmp_path / "two.onnx")
    found = export.measure(tmp_path / "two.onnx", batch=3, seconds=0.1)
    assert [(spec["name"], spec["shape"], spec["values"]) for spec in found.as_dict()["inputs"]] == [
        ("input_0", [3, 6], "standard normal"), ("input_1", [3], "0 or 1"),
    ]


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "fp32"), (np.float16, "fp16")])
def test_the_result_names_the_precision_of_the_weights(tmp_path, dtype, name):
    path = foreign(tmp_path / "foreign.onnx", dtype=dtype)
    assert stored_precision(path) == name
    assert export.measure(path, shapes={"images:0": (3, 9, 9)}, seconds=0.1).precision == name


def test_weights_in_constant_nodes_are_weights_too(tmp_path):
    path = foreign(tmp_path / "foreign.onnx", dtype=np.float16)
    model = onnx.load(path)
    for weight in model.graph.initializer:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [weight.name], value=weight))
    del model.graph.initializer[:]
    onnx.save(model, path)
    assert stored_precision(path) == "fp16"
    assert export.measure(path, shapes={"images:0": (3, 9, 9)}, seconds=0.1).precision == "fp16"


def test_eight_bit_weights_and_none_at_all(tmp_path):
    path = foreign(tmp_path / "foreign.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(500, np.int8), "quantised"))
    onnx.save(model, path)
    assert stored_precision(path) == "int8"
    del model.graph.initializer[:]
    onnx.save(model, path)
    assert stored_precision(path) == "fp32"


def test_a_precision_that_the_file_does_not_have_is_refused(tmp_path):
    path = foreign(tmp_path / "foreign.onnx")
    with pytest.raises(export.CannotMeasure, match="precision fp16 asked of a file whose weights are fp32"):
        export.measure(path, shapes={"images:0": (3, 9, 9)}, precision="fp16")
