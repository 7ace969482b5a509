"""Pixels in: the file does what the formula says, and nothing else is accepted."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_networks import TwoInputs

import export

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRE = export.Preprocessing(MEAN, STD)


@pytest.fixture(scope="module")
def file(tmp_path_factory, network, image):
    return export.to_onnx(network, image, tmp_path_factory.mktemp("pixels") / "m.onnx", preprocessing=PRE)


def test_the_file_takes_pixels_and_computes_the_formula(file, network):
    session = onnxruntime.InferenceSession(file.path)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("input", "tensor(uint8)", ["batch", 12, 12, 3])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    images = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(images).float()).numpy()
    network.train()
    (found,) = session.run(None, {"input": pixels})
    assert np.ptp(expected, axis=0).max() > 0.01, "the output follows the input"
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_only_plain_operators_are_added(file, files):
    """No index arithmetic: with the strides of NHWC the exporter would write it for every pooling."""
    with_it, without = ([n.op_type for n in onnx.load(p).graph.node] for p in (file.path, files["small"].path))
    assert with_it == ["Transpose", "Cast", "Div", "Sub", "Div", *without]


def test_the_file_says_so(file):
    found = {entry.key: entry.value for entry in onnx.load(file.path).metadata_props}
    assert (json.loads(found["mean"]), json.loads(found["std"])) == ([*MEAN], [*STD])
    assert "uint8 NHWC" in found["preprocessing"]


def test_parity_knows_the_preprocessing(file, network, image):
    assert export.check_parity(file.path, network, image, preprocessing=PRE) == file.parity
    for wrong in (export.Preprocessing(MEAN, (0.229, 0.224, 0.3)), export.Preprocessing(MEAN[::-1], STD)):
        with pytest.raises(export.ParityFailed, match="the file is wrong by"):
            export.check_parity(file.path, network, image, preprocessing=wrong)


def test_a_constant_output_is_noticed_with_pixels_too(file, network, image):
    silent = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
    torch.nn.init.zeros_(silent[2].weight)
    with pytest.raises(export.ParityFailed, match="is constant, or nearly so"):
        export.check_parity(file.path, silent, image, preprocessing=PRE, tolerance=1e9)


def test_the_same_values_may_be_given_as_metadata_but_no_others(tmp_path, network, image):
    same = export.to_onnx(network, image, tmp_path / "a.onnx", preprocessing=PRE, metadata={"mean": json.dumps(MEAN)})
    assert same.parity.worst < 1e-5
    with pytest.raises(export.NotExportable, match="'mean' is written by the export itself"):
        export.to_onnx(network, image, tmp_path / "b.onnx", preprocessing=PRE, metadata={"mean": "[0]"})


@pytest.mark.parametrize(
    ("mean", "std"),
    [(MEAN[:2], STD), (MEAN, STD[:2]), ((), ()), (MEAN, (0.2, 0.2, 0.0)), (MEAN, (1, 1, float("nan")))],
)
def test_what_does_not_normalise_three_channels_is_refused(tmp_path, network, image, mean, std):
    with pytest.raises(export.NotExportable, match=r"do not normalise \(1, 3, 12, 12\) torch.float32"):
        export.to_onnx(network, image, tmp_path / "m.onnx", preprocessing=export.Preprocessing(mean, std))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_takes_no_images_is_refused(tmp_path):
    with pytest.raises(export.NotExportable, match=r"do not normalise .* and \(2,\) torch.int64"):
        export.to_onnx(
            TwoInputs(), (torch.randn(2, 6), torch.tensor([6, 0])), tmp_path / "m.onnx", preprocessing=PRE
        )
