"""`to_onnx` as a whole: what the file is, what stays as it was, what is refused."""

import copy
import getpass
import hashlib
import json
import logging
import random
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_networks import FixedBatch, TwoInputs, plain
from torch import Tensor, nn

import export
from export import drafts


def test_the_file_is_one_dense_portable_file(files):
    file = files["small"]
    model = onnx.load(file.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert (model.ir_version, file.opset) == (8, 18)
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [entry.name for entry in file.path.parent.iterdir() if "small" in entry.name] == ["small.onnx"]


def test_the_receipt_tells_the_truth(files):
    file = files["small"]
    content = file.path.read_bytes()
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file.size == len(content)
    assert [row.batch for row in file.parity.batches] == [1, 2, 5]
    assert 0 < file.parity.worst < 1e-5
    assert json.loads(json.dumps(file.as_dict()))["parity"]["worst"] == file.parity.worst


def test_metadata_are_readable_in_onnxruntime(files):
    found = onnxruntime.InferenceSession(files["small"].path).get_modelmeta().custom_metadata_map
    assert found["recipe"] == "none"
    assert json.loads(found["labels"]) == ["a", "b", "c", "d", "é"]
    assert found["tool"] == "diffprune"
    assert found["torch_version"] == torch.__version__
    assert "0.0001 at batch 1, 2, 5" in found["parity"]


def test_no_path_and_no_user_is_in_the_file(files):
    content = files["small"].path.read_bytes()
    here = Path(__file__).resolve()
    for leak in {str(here.parents[2]), str(Path.home()), str(Path(torch.__file__).parent), "stack_trace", ".py"}:
        assert leak.encode() not in content
    if len(getpass.getuser()) > 4:  # shorter ones may be part of another word
        assert getpass.getuser().encode() not in content


def test_nothing_of_the_exporter_is_left_in_newer_formats_either(tmp_path, network, image):
    """From opset 21 on the file format has room for metadata at every node and value, and the exporter uses it."""
    file = export.to_onnx(network, image, tmp_path / "m.onnx", opset=21)
    graph = onnx.load(file.path).graph
    parts = (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    assert [part.name for part in parts if part.metadata_props or part.doc_string] == []


def test_the_model_and_all_random_state_stay_as_they_were(tmp_path, image, capfd):
    model = plain()
    model[0].eval()
    model[3].weight.requires_grad_(False)
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export.to_onnx(model, image, tmp_path / "m.onnx")
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert len(model[2]._forward_hooks) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not isinstance(p, torch._subclasses.FakeTensor) and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert capfd.readouterr() == ("", "")


def test_several_inputs_and_nested_outputs(tmp_path):
    x = torch.randn(3, 6), torch.tensor([6, 0, 2])
    file = export.to_onnx(TwoInputs(), x, tmp_path / "two.onnx")
    session = onnxruntime.InferenceSession(file.path)
    assert [value.name for value in session.get_inputs()] == ["input_0", "input_1"]
    assert [value.name for value in session.get_outputs()] == ["output_0", "output_1", "output_2"]
    assert file.parity.worst < 1e-5


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(6, 4))

    def forward(self, first, *others):
        return sum(others, first) @ self.logits


def test_any_number_of_inputs_and_a_weight_of_the_name_of_an_output(tmp_path):
    x = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6)
    with pytest.raises(export.NotExportable, match="'logits' is the name of a weight"):
        export.to_onnx(Sum(), x, tmp_path / "sum.onnx")
    file = export.to_onnx(Sum(), x, tmp_path / "sum.onnx", output_names=["scores"])
    assert [len(value.shape) for value in onnxruntime.InferenceSession(file.path).get_inputs()] == [2, 2, 2]


def test_names_can_be_chosen(tmp_path, network, image):
    names = {"input_names": ["pixels"], "output_names": ["scores"]}
    file = export.to_onnx(network, image, tmp_path / "m.onnx", opset=20, **names)
    model = onnx.load(file.path)
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("pixels", "scores")
    assert (model.opset_import[0].version, model.ir_version, file.opset) == (20, 9, 20)


def test_large_networks_get_a_data_file_beside_the_first(tmp_path, network, image, monkeypatch):
    monkeypatch.setattr(drafts, "SINGLE_FILE_LIMIT", 1000)
    file = export.to_onnx(network, image, tmp_path / "big.onnx")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    locations = {
        entry.value for tensor in onnx.load(file.path, load_external_data=False).graph.initializer
        for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"big.onnx.data"}
    assert export.check_parity(file.path, network, image).worst == file.parity.worst
    assert file.size == sum(entry.stat().st_size for entry in tmp_path.iterdir())


def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, image):
    older = tmp_path / "m.onnx"
    older.write_bytes(b"older")
    silent = plain()
    nn.init.zeros_(silent[-1].weight)
    with pytest.raises(export.ParityFailed, match="is constant, or nearly so"):
        export.to_onnx(silent, image, older)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("m.onnx", b"older")]


def test_a_fixed_batch_is_refused(tmp_path):
    with pytest.raises(export.NotExportable, match="batch"):
        export.to_onnx(FixedBatch(), torch.randn(2, 6), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_does_not_run_in_onnxruntime_is_refused(tmp_path, network, image):
    model = copy.deepcopy(network).double()
    with pytest.raises(export.NotExportable, match="onnxruntime does not run what the exporter wrote"):
        export.to_onnx(model, image.double(), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 asked; possible are 18 to"),
        ({"opset": 1000}, "opset 1000 asked"),
        ({"input_names": ["a", "b"]}, "does not name 1 input"),
        ({"output_names": "logits"}, "does not name 1 output"),
        ({"output_names": ["input"]}, "are not distinct"),
        ({"labels": ["cat", "dog"]}, "2 labels for 5 classes"),
        ({"metadata": {"epochs": 3}}, "is not a pair of strings"),
        ({"metadata": {"tool": "mine"}}, "'tool' is written by the export itself"),
    ],
)
def test_impossible_options_are_refused(tmp_path, network, image, options, message):
    with pytest.raises(export.NotExportable, match=message):
        export.to_onnx(network, image, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_place_is_refused(tmp_path, network, image):
    with pytest.raises(export.NotExportable, match="folder does not exist"):
        export.to_onnx(network, image, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(export.NotExportable, match="this is a folder"):
        export.to_onnx(network, image, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_on_the_gpu_stays_there(tmp_path, image: Tensor):
    model = plain().cuda()
    export.to_onnx(model, image.cuda(), tmp_path / "m.onnx")
    assert all(parameter.is_cuda for parameter in model.parameters())


def test_a_file_for_timing_is_that_network_and_may_be_constant(network, image, tmp_path):
    checked = export.to_onnx(network, image, tmp_path / "checked.onnx")
    timing = export.for_timing(network, image, tmp_path / "timing.onnx")
    one, other = (onnx.load(file).graph.node for file in (checked.path, timing))
    assert [(node.op_type, node.input) for node in one] == [(node.op_type, node.input) for node in other]
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 5))
    nn.init.zeros_(constant[1].weight)
    with pytest.raises(export.ParityFailed, match="constant"):
        export.to_onnx(constant, image, tmp_path / "refused.onnx")
    assert export.measure(export.for_timing(constant, image, tmp_path / "timing.onnx"), seconds=0.1).median > 0
