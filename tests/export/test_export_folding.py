"""Gates left in a network: closed ones are refused, factors go into the weights."""

import onnx
import pytest
from tiny_networks import Gated

import export


@pytest.mark.parametrize("behind_activation", [False, True])
def test_a_closed_gate_is_refused(tmp_path, image, behind_activation):
    model = Gated([1.0, 0.0, 1.0, 1.0, 0.0], behind_activation=behind_activation)
    with pytest.raises(export.NotExportable, match="2 of 5 channels are multiplied with zero"):
        export.to_onnx(model, image, tmp_path / "m.onnx")


def test_an_open_gate_is_folded_and_so_is_the_norm_behind_it(tmp_path, image):
    model = Gated([1.0, 0.5, -2.0, 3.0])
    file = export.to_onnx(model, image, tmp_path / "m.onnx")
    operators = [node.op_type for node in onnx.load(file.path).graph.node]
    assert "Mul" not in operators
    assert "BatchNormalization" not in operators
    assert file.parity.worst < 1e-5
