"""Random inputs that fit a file."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import export
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


def test_pixels_take_all_their_values():
    pixels = random_feed((InputSpec("x", (64, 64), "tensor(uint8)"),), seed=0)["x"]
    assert (pixels.dtype, pixels.min(), pixels.max()) == (np.uint8, 0, 255)
