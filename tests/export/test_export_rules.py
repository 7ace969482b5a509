"""Every law of a written file, broken once on purpose."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tiny_networks import ReadTwice, SharedConv

import export
from export.rules import check_rules

LAWS = {"opset": 18, "ir_version": 8, "input_names": ["input"], "output_names": ["logits"]}


def insert_behind_conv(model, operator, *constants):
    """Put a node with constant parameters of 8 channels between the second Conv and its reader."""
    conv = [node for node in model.graph.node if node.op_type == "Conv"][1]
    value = conv.output[0]
    conv.output[0] = "inner"
    for index, constant in enumerate(constants):
        model.graph.initializer.append(numpy_helper.from_array(constant, f"constant_{index}"))
    names = [f"constant_{index}" for index in range(len(constants))]
    position = list(model.graph.node).index(conv) + 1
    model.graph.node.insert(position, helper.make_node(operator, ["inner", *names], [value]))


ONES = np.ones(8, np.float32)


def break_domain(model):
    model.graph.node[1].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def break_function(model):
    node = helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "Twice", ["x"], ["y"], [node], [helper.make_opsetid("", 18)]))


BREAKS = [
    (lambda m: m.graph.node[0].input.__setitem__(0, "missing"), "not valid ONNX"),
    (lambda m: setattr(m.opset_import[0], "version", 19), "operator sets"),
    (break_domain, "operator sets"),
    (lambda m: setattr(m, "ir_version", 9), "IR version 9"),
    (break_function, "1 local functions are left"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 4), "is 4, not free"),
    (lambda m: insert_behind_conv(m, "BatchNormalization", ONES, ONES, ONES, ONES), "BatchNormalization is left"),
    (lambda m: insert_behind_conv(m, "Mul", ONES.reshape(1, 8, 1, 1)), "constant factor is left"),
    (lambda m: insert_behind_conv(m, "Mul", ONES.reshape(8, 1, 1)), "constant factor is left"),
]


@pytest.mark.parametrize(("fault", "message"), BREAKS)
def test_a_broken_law_is_found(files, tmp_path, fault, message):
    model = onnx.load(files["small"].path)
    fault(model)
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    with pytest.raises(export.NotExportable, match=message):
        check_rules(path, **LAWS)


def test_the_untouched_file_obeys(files):
    check_rules(files["small"].path, **LAWS)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_other_names_are_found(files, kind):
    with pytest.raises(export.NotExportable, match="wanted were \\['other'\\]"):
        check_rules(files["small"].path, **(LAWS | {f"{kind}_names": ["other"]}))


@pytest.mark.parametrize("shape", [(), (1, 1, 1), (8, 12, 12)])
def test_a_factor_of_no_channel_alone_is_no_gate(files, tmp_path, shape):
    model = onnx.load(files["small"].path)
    insert_behind_conv(model, "Mul", np.full(shape, 0.5, np.float32))
    onnx.save(model, tmp_path / "m.onnx")
    check_rules(tmp_path / "m.onnx", **LAWS)


@pytest.mark.parametrize(("network", "norms"), [(SharedConv(), 2), (ReadTwice(), 1)])
def test_what_cannot_be_folded_is_allowed_to_stay(tmp_path, image, network, norms):
    file = export.to_onnx(network, image, tmp_path / "m.onnx")
    operators = [node.op_type for node in onnx.load(file.path).graph.node]
    assert operators.count("BatchNormalization") == norms
    assert file.parity.worst < 1e-5
