"""The parity gate must open for the right file and for no other."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_networks import TwoInputs, plain
from torch import nn

import export


def tampered(source, target, change):
    """A copy of an ONNX file in which `change` has altered the weights of the last layer."""
    model = onnx.load(source)
    head = next(tensor for tensor in model.graph.initializer if tuple(tensor.dims) == (5, 8))
    head.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(head).copy()), head.name))
    onnx.save(model, target)
    return target


def one_weight(weight):
    weight[2, 3] += 0.05 * np.abs(weight).max()
    return weight


@pytest.mark.parametrize("change", [one_weight, lambda w: w * 1.01, lambda w: w[::-1].copy()])
def test_a_tampered_file_is_refused(files, network, image, tmp_path, change):
    path = tampered(files["small"].path, tmp_path / "bad.onnx", change)
    with pytest.raises(export.ParityFailed, match="the file is wrong by"):
        export.check_parity(path, network, image)


def test_an_untouched_copy_passes(files, network, image, tmp_path):
    parity = export.check_parity(tampered(files["small"].path, tmp_path / "copy.onnx", lambda w: w), network, image)
    assert parity == files["small"].parity
    assert all(row.top1_agreement == 1 and row.sqnr_db > 100 for row in parity.batches)


def test_the_error_is_relative(files, network, image, tmp_path):
    """Scaled by 1e-6 or 1e6, the right file still passes and the wrong one still fails."""
    for scale in (1e-6, 1e6):
        model = copy.deepcopy(network)
        with torch.no_grad():
            model[-1].weight *= scale
            model[-1].bias *= scale
        right = export.to_onnx(model, image, tmp_path / "right.onnx")
        assert right.parity.worst < 1e-5
        with pytest.raises(export.ParityFailed, match="the file is wrong by"):
            export.check_parity(tampered(right.path, tmp_path / "bad.onnx", one_weight), model, image)


def test_the_tolerance_is_the_callers(files, network, image, tmp_path):
    path = tampered(files["small"].path, tmp_path / "bad.onnx", lambda w: w * 1.001)
    parity = export.check_parity(path, network, image, tolerance=0.01)
    assert 1e-4 < parity.worst < 0.01
    assert parity.tolerance == 0.01


def test_not_a_number_is_refused_on_either_side(files, network, image, tmp_path):
    path = tampered(files["small"].path, tmp_path / "nan.onnx", lambda w: w * np.float32("nan"))
    with pytest.raises(export.ParityFailed, match="the file is wrong by nan"):
        export.check_parity(path, network, image)
    broken = copy.deepcopy(network)
    nn.init.constant_(broken[-1].bias, float("nan"))
    with pytest.raises(export.ParityFailed, match="returns NaN or infinity"):
        export.check_parity(files["small"].path, broken, image)


def test_a_constant_reference_proves_nothing(network, image, files):
    silent = copy.deepcopy(network)
    nn.init.zeros_(silent[-1].weight)
    with pytest.raises(export.ParityFailed, match="is constant, or nearly so"):
        export.check_parity(files["small"].path, silent, image, tolerance=1e9)


def test_a_weak_dependence_on_the_input_is_followed_or_refused(network, image, tmp_path):
    """The network varies by 1e-5 of its largest output. A file that always answers the same is within the tolerance."""
    faint = copy.deepcopy(network)
    with torch.no_grad():
        faint[-1].weight *= 1e-3
        faint[-1].bias.copy_(torch.arange(1.0, 6.0))
    right = export.to_onnx(faint, image, tmp_path / "right.onnx")
    constant = tampered(right.path, tmp_path / "constant.onnx", lambda w: 0 * w)
    with pytest.raises(export.ParityFailed, match="is constant, or nearly so"):
        export.check_parity(constant, faint, image)


def test_other_examples_are_refused(files, network):
    with pytest.raises(export.BadOnnx, match="the example inputs have"):
        export.check_parity(files["small"].path, network, torch.randn(1, 3, 8, 8))


def test_other_outputs_are_refused(files, network, image):
    wider = copy.deepcopy(network)
    wider[-1] = nn.Linear(8, 6)
    with pytest.raises(export.BadOnnx, match="the file returns shapes"):
        export.check_parity(files["small"].path, wider, image)


def test_integers_repeat_the_examples_values(tmp_path):
    """Index 6 of a table of 7 is valid, a random integer would not be."""
    model, x = TwoInputs(), (torch.randn(1, 6), torch.tensor([6]))
    file = export.to_onnx(model, x, tmp_path / "m.onnx")
    assert export.check_parity(file.path, model, x).worst < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_compared_at_that_batch(files, network, image, tmp_path, batch):
    """Also one, where a single draw could not tell a constant output from one that follows the input."""
    model = onnx.load(files["small"].path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "static.onnx")
    parity = export.check_parity(tmp_path / "static.onnx", network, image)
    assert {row.batch for row in parity.batches} == {batch}


def test_an_empty_output_is_compared_as_such(tmp_path):
    class Empty(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * x, x[:, :0]

    assert export.to_onnx(Empty(), torch.randn(2, 3), tmp_path / "empty.onnx").parity.worst < 1e-5


def test_as_dict_is_json_even_with_infinite_sqnr():
    row = export.BatchParity(1, 0.0, 0.0, 1.0, float("inf"))
    text = json.dumps(export.Parity((row,), 1e-4).as_dict(), allow_nan=False)
    assert json.loads(text)["batches"][0]["sqnr_db"] is None


def test_random_state_is_untouched(files, image):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    export.check_parity(files["small"].path, plain(), image)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_answers_with_infinity_is_refused(files, network, image, tmp_path):
    def infinite(weight):
        weight[0, 0] = np.inf
        return weight

    path = tampered(files["small"].path, tmp_path / "inf.onnx", infinite)
    with pytest.raises(export.ParityFailed, match="the file is wrong by"):
        export.check_parity(path, network, image)


class Anchored(nn.Module):
    """A constant, what a head says, and how alike the samples of the batch are."""

    def __init__(self):
        super().__init__()
        self.anchors, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(6, 4)

    def forward(self, x):
        return 2 * self.anchors, self.head(x), x @ x.T


def test_a_constant_before_them_hides_no_output(tmp_path):
    torch.manual_seed(0)
    network, x = Anchored(), torch.randn(2, 6)
    assert export.to_onnx(network, x, tmp_path / "anchored.onnx").parity.worst < 1e-5
    nn.init.zeros_(network.head.weight)
    with pytest.raises(export.ParityFailed, match="the network's output is constant"):
        export.to_onnx(network, x, tmp_path / "constant.onnx")


class Towers(nn.Module):
    """Two outputs, one of pixels, one of words."""

    def __init__(self):
        super().__init__()
        self.conv, self.words = nn.Conv2d(3, 4, 3), nn.Embedding(10, 4)

    def forward(self, image, words):
        return self.conv(image).mean((2, 3)), self.words(words).mean(1)


def test_an_output_may_follow_inputs_that_cannot_be_drawn(tmp_path):
    torch.manual_seed(0)
    given = torch.randn(1, 3, 8, 8), torch.tensor([[1, 2, 3]])
    assert export.to_onnx(Towers(), given, tmp_path / "towers.onnx").parity.worst < 1e-5
    same = Towers()
    nn.init.zeros_(same.words.weight)
    with pytest.raises(export.ParityFailed, match="the network's output is constant"):
        export.to_onnx(same, given, tmp_path / "constant.onnx")
