"""Random inputs that fit a file."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import export
from export.errors import BadOnnx
from export.feeds import InputSpec, input_specs, random_feed

PATH = Path("model.onnx")


def session(*inputs):
    """What the functions ask of an onnxruntime session: its inputs."""
    return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name=n, shape=s, type=t) for n, s, t in inputs])


def test_the_free_batch_is_filled_in():
    specs = input_specs(session(("x", ["batch", 3, 8, 8], "tensor(float)")), batch=4, path=PATH)
    assert specs == (InputSpec("x", (4, 3, 8, 8), "tensor(float)"),)


def test_a_fixed_batch_has_to_be_the_one_asked_for():
    fixed = session(("x", [1, 3], "tensor(float)"))
    assert input_specs(fixed, batch=1, path=PATH)[0].shape == (1, 3)
    with pytest.raises(export.CannotMeasure, match="fixed batch 1, asked was 2"):
        input_specs(fixed, batch=2, path=PATH)


@pytest.mark.parametrize("axis", ["height", None])
def test_another_free_axis_is_named(axis):
    with pytest.raises(export.CannotMeasure, match=f"axis 2 of input x, {axis or 'unnamed'}"):
        input_specs(session(("x", ["batch", 3, axis, 8], "tensor(float)")), batch=1, path=PATH)


def test_sizes_that_are_given_hold_where_the_file_says_nothing():
    silent = session(("x", [], "tensor(float)"))
    assert input_specs(silent, batch=8, path=PATH, shapes={"x": (3, 4, 4)})[0].shape == (8, 3, 4, 4)
    assert input_specs(silent, batch=1, path=PATH)[0].shape == ()


def test_who_leaves_an_input_without_sizes_is_asked_for_them(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")], "silent",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")],
    )  # fmt: skip
    path = tmp_path / "silent.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(path))
    with pytest.raises(BadOnnx, match=r"says no sizes of input x.*--input x=3,224,224"):
        export.measure(path, seconds=0.05)
    assert export.measure(path, seconds=0.05, shapes={"x": (3, 4, 4)}).median > 0


def test_an_unusual_type_is_refused():
    with pytest.raises(export.CannotMeasure, match=r"type tensor\(string\)"):
        input_specs(session(("x", ["batch"], "tensor(string)")), batch=1, path=PATH)


def test_feeds_have_type_and_shape_and_repeat_with_the_seed():
    specs = (InputSpec("x", (64, 64), "tensor(float)"), InputSpec("i", (100,), "tensor(int64)"))
    feed, again, other = (random_feed(specs, seed=seed) for seed in (1, 1, 2))
    assert feed["x"].dtype == np.float32
    assert abs(float(feed["x"].std()) - 1) < 0.1
    assert set(feed["i"].tolist()) == {0, 1}
    assert np.array_equal(feed["x"], again["x"])
    assert not np.array_equal(feed["x"], other["x"])


def test_only_the_first_input_says_what_the_batch_is():
    """A fixed first axis behind it may belong to a table that all images share; a free one is the batch as well."""
    kind = "tensor(float)"
    inputs = session(("x", ["n", 3], kind), ("table", [7, 4], kind), ("k", ["n"], kind))
    assert [spec.shape for spec in input_specs(inputs, batch=5, path=PATH)] == [(5, 3), (7, 4), (5,)]
    with pytest.raises(export.CannotMeasure, match="fixed batch 1, asked was 5"):
        input_specs(session(("x", [1, 3], "tensor(float)"), ("y", ["n"], "tensor(float)")), batch=5, path=PATH)
    assert input_specs(session(("scale", [], "tensor(float)")), batch=1, path=PATH)[0].shape == ()


def test_free_axes_take_the_sizes_given():
    free = session(("x", ["n", 3, "h", None], "tensor(float)"))
    assert input_specs(free, batch=2, path=PATH, shapes={"x": (3, 8, 9)})[0].shape == (2, 3, 8, 9)
    for sizes, fact in [
        ((4, 8, 9), "axis 1 of input x is 3, asked was 4"),
        ((3, 8), "has 3 axes beside the batch, given were sizes for 2"),
        ((3, 0, 9), "axis 2 of input x is h, asked was 0"),
    ]:
        with pytest.raises(export.CannotMeasure, match=fact):
            input_specs(free, batch=2, path=PATH, shapes={"x": sizes})
    with pytest.raises(export.CannotMeasure, match="there is no input y; there is x"):
        input_specs(free, batch=2, path=PATH, shapes={"y": (3, 8, 9)})


def test_what_is_fed_is_said():
    specs = [InputSpec("x", (1,), kind) for kind in
             ("tensor(float16)", "tensor(int64)", "tensor(bool)", "torch.int64", "tensor(uint8)")]
    assert [spec.values for spec in specs] == ["standard normal", "0 or 1", "0 or 1", "as given", "0 to 255"]
    assert specs[1].as_dict() == {"name": "x", "shape": [1], "type": "tensor(int64)", "values": "0 or 1"}


def test_pixels_take_all_their_values():
    pixels = random_feed((InputSpec("x", (64, 64), "tensor(uint8)"),), seed=0)["x"]
    assert (pixels.dtype, pixels.min(), pixels.max()) == (np.uint8, 0, 255)


def test_a_batch_that_no_axis_can_take_is_not_claimed():
    with pytest.raises(export.CannotMeasure, match="a batch of 8 was asked for; no axis of x can take it"):
        input_specs(session(("x", [], "tensor(float)")), batch=8, path=PATH)
    with pytest.raises(export.CannotMeasure, match="no axis of scale, x can take it"):
        input_specs(session(("scale", [], "tensor(float)"), ("x", [1, 3], "tensor(float)")), batch=8, path=PATH)
    with pytest.raises(export.CannotMeasure, match="no axis of an input can take it"):
        input_specs(session(), batch=8, path=PATH)


def test_inputs_that_no_memory_holds():
    for batch in (10**11, 10**18):
        with pytest.raises(export.CannotMeasure, match="there is no memory for x"):
            random_feed((InputSpec("x", (batch, 224, 224, 3), "tensor(float)"),), seed=0)
