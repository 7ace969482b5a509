"""`quantize` and `to_fp16`: what is in the files, what is said about them, what is refused."""

import getpass
import hashlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import TwoInputs, plain
from torch import nn
from torchvision.models import VisionTransformer

import export
from export import quantization, recipes

RECIPES = ("x86-vnni", "x86-avx2", "tensorrt")
HERE = Path(__file__).resolve()


class Residual(nn.Module):
    """A block with a skip connection behind a strided convolution, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.block(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(3)).split(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    """`float32.onnx` of a network with a skip connection."""
    folder = tmp_path_factory.mktemp("quantized")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual()
    export.to_onnx(model, images[0][:1], folder / "float32.onnx", metadata={"recipe": "none"}, labels=list("abcde"))
    return folder


@pytest.fixture(scope="module")
def made(folder, images):
    """Every kind of smaller file, by the name of its recipe."""
    source = folder / "float32.onnx"
    int8 = {name: export.quantize(source, folder / f"{name}.onnx", images, target=name) for name in RECIPES}
    return int8 | {"fp16": export.to_fp16(source, folder / "fp16.onnx", images)}


class Graph:
    """A file's nodes by what they write, and its constants."""

    def __init__(self, path: Path) -> None:
        self.nodes = list(onnx.load(path).graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        self.writers = {name: node for node in self.nodes for name in node.output}

    def of(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in kinds]

    def stored(self, name: str) -> np.ndarray:
        """The constant behind a value, through the node that dequantizes it."""
        return self.constants[self.writers[name].input[0] if name in self.writers else name]


@pytest.mark.parametrize("name", RECIPES)
def test_activations_and_weights_have_the_types_of_the_target(made, name):
    graph = Graph(made[name].path)
    wanted = np.int8 if name == "tensorrt" else np.uint8
    points = [graph.constants[node.input[2]] for node in graph.of("QuantizeLinear")]
    assert {point.dtype for point in points} == {np.dtype(wanted)}
    assert any(points) == (name != "tensorrt"), "symmetric means zero points of 0"
    layers = graph.of("Conv", "Gemm")
    assert len(layers) == 4
    for layer in layers:
        assert graph.writers[layer.input[0]].op_type == graph.writers[layer.input[1]].op_type == "DequantizeLinear"
        weight, scales = graph.stored(layer.input[1]), graph.constants[graph.writers[layer.input[1]].input[1]]
        assert weight.dtype == np.int8
        assert scales.shape == (len(weight),), "a scale per output channel"
        assert not graph.constants[graph.writers[layer.input[1]].input[2]].any()
        largest = np.abs(weight.astype(int)).max(axis=tuple(range(1, weight.ndim)))
        assert set(largest) <= ({63, 64} if name == "x86-avx2" else {127, 128}), "every channel uses all its bits"


def test_for_tensorrt_only_what_weighted_layers_read_is_quantized(made):
    graph = Graph(made["tensorrt"].path)
    for layer in graph.of("Conv", "Gemm"):
        assert graph.stored(layer.input[2]).dtype == np.float32, "the bias"
    for node in graph.of("QuantizeLinear"):
        assert node.input[0] not in graph.writers or graph.writers[node.input[0]].op_type not in ("Conv", "Gemm")
    (add,) = graph.of("Add")
    assert "DequantizeLinear" in {graph.writers[name].op_type for name in add.input}, "the skip connection is int8"


@pytest.mark.parametrize("name", [*RECIPES, "fp16"])
def test_the_file_is_used_like_the_float32_one(made, folder, name):
    small, large = (onnx.load(path) for path in (made[name].path, folder / "float32.onnx"))
    assert small.opset_import == large.opset_import
    assert small.ir_version == large.ir_version == 8
    assert {node.domain for node in small.graph.node} == {""}
    for kind in ("input", "output"):
        found, wanted = ([(v.name, v.type) for v in getattr(model.graph, kind)] for model in (small, large))
        assert found == wanted
        assert {v.type.tensor_type.elem_type for v in getattr(small.graph, kind)} == {TensorProto.FLOAT}
    for batch in (1, 3):
        images = np.zeros((batch, 3, 12, 12), np.float32)
        assert onnxruntime.InferenceSession(made[name].path).run(["logits"], {"input": images})[0].shape == (batch, 5)


@pytest.mark.parametrize("name", [*RECIPES, "fp16"])
def test_the_receipt_and_the_metadata_tell_the_truth(made, folder, images, name):
    small, content = made[name], made[name].path.read_bytes()
    assert small.sha256 == hashlib.sha256(content).hexdigest()
    assert small.size == len(content)
    assert small.size < (0.55 if name == "fp16" else 0.5) * (folder / "float32.onnx").stat().st_size
    old, new = (
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for path in (folder / "float32.onnx", small.path)
    )
    recipe = json.loads(new.pop("quantization"))
    assert recipe == small.recipe
    assert recipe["examples"] == 24
    assert recipe["precision"] == ("fp16" if name == "fp16" else "int8")
    assert name == "fp16" or recipe["target"] == name
    assert new.pop("float32_sha256") == hashlib.sha256((folder / "float32.onnx").read_bytes()).hexdigest()
    assert new.pop("float32_parity") == old.pop("parity"), "no promise that only the float32 file keeps"
    assert new == old
    assert json.loads(json.dumps(small.as_dict(), allow_nan=False))["fidelity"]["examples"] == 24


@pytest.mark.parametrize("name", [*RECIPES, "fp16"])
def test_the_fidelity_is_that_of_the_files(made, folder, images, name):
    found, wanted = (
        np.concatenate([onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0] for x in images])
        for path in (made[name].path, folder / "float32.onnx")
    )
    fidelity = made[name].fidelity
    noise, signal = np.square(found - wanted, dtype=float).sum(), np.square(wanted, dtype=float).sum()
    assert fidelity.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.1)
    assert fidelity.top1_agreement == pytest.approx(np.mean(found.argmax(1) == wanted.argmax(1)), abs=0.05)
    assert fidelity.sqnr_db > (50 if name == "fp16" else 15)
    assert fidelity.relative < (1e-2 if name == "fp16" else 0.2)


def test_sqnr_and_agreement_by_hand():
    reference = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]], np.float32)
    found = reference + np.array([[0.0, 0.5], [-1.5, 0.0], [0.0, -1.0]], np.float32)
    result = export.fidelity([found], [reference])
    assert result.sqnr_db == pytest.approx(10 * math.log10((9 + 16 + 1 + 4 + 4) / (0.25 + 2.25 + 1)))
    assert result.top1_agreement == pytest.approx(2 / 3), "the second changes; in the third two are equally large"
    assert result.relative == pytest.approx(1.5 / 4)
    assert result.examples == 3
    assert export.fidelity([reference], [reference]).sqnr_db == math.inf
    worst = export.fidelity([reference, found], [reference, reference])
    assert worst == result, "the worst of all outputs"
    with pytest.raises(export.BadOnnx, match=r"the outputs are \[\(2, 2\)\] and \[\(3, 2\)\]"):
        export.fidelity([found[:2]], [reference])


def test_what_is_inside_as_float16_is_half_as_large(made):
    graph = Graph(made["fp16"].path)
    assert {graph.constants[layer.input[1]].dtype for layer in graph.of("Conv", "Gemm")} == {np.dtype(np.float16)}


def test_calibration_decides_the_ranges(tmp_path, folder, made, images):
    """With images a hundred times too dark the real ones are cut off."""
    dark = [0.01 * batch for batch in images]
    wrong = export.quantize(folder / "float32.onnx", tmp_path / "dark.onnx", dark, target="tensorrt")
    found, wanted = (
        export.answers(path, [batch.numpy() for batch in images]) for path in (wrong.path, folder / "float32.onnx")
    )
    assert export.fidelity(found, wanted).sqnr_db < made["tensorrt"].fidelity.sqnr_db - 10


@pytest.mark.parametrize(
    ("sets", "name"),
    [(("avx2", "avx512f"), "x86-avx2"), (("avx2", "avx512_vnni"), "x86-vnni"), (("avx_vnni",), "x86-vnni")],
)
def test_x86_means_this_cpu(monkeypatch, sets, name):
    monkeypatch.setattr(recipes, "instruction_sets", lambda: sets)
    assert recipes.resolved("x86") == name
    assert recipes.resolved("tensorrt") == "tensorrt"


def test_two_processes_write_the_same_bytes_without_a_trace_of_the_machine(tmp_path, folder, made, images):
    torch.save(list(images), tmp_path / "images.pt")
    script = (
        "import logging, sys, torch, export; images = torch.load(sys.argv[2], weights_only=True); "
        "print(export.quantize(sys.argv[1], sys.argv[3], images, target='tensorrt').sha256,"
        " export.to_fp16(sys.argv[1], sys.argv[3], images).sha256)\n"
        "with export.calibration.silent():\n"
        "    logging.warning('what onnxruntime says through the root logger')\n"
        "print(logging.getLogger().handlers)"
    )
    words = [folder / "float32.onnx", tmp_path / "images.pt", tmp_path / "again.onnx"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=True, timeout=120,
        env={"PYTHONPATH": str(HERE.parents[2]), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == [made["tensorrt"].sha256, made["fp16"].sha256, "[]"]
    assert done.stderr == ""
    for file in made.values():
        content = file.path.read_bytes()
        leaks = {str(folder), str(HERE.parents[2]), str(Path.home()), str(Path(torch.__file__).parent), "/tmp", ".py"}
        for leak in leaks:
            assert leak.encode() not in content
        if len(getpass.getuser()) > 4:
            assert getpass.getuser().encode() not in content


def test_nothing_else_is_written_said_or_changed(tmp_path, folder, images, capfd):
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.root.manager.disable
    (folder / "float32-inferred.onnx").write_bytes(b"a name that onnxruntime takes for its own")
    files = {path: path.read_bytes() for path in folder.iterdir()}
    export.quantize(folder / "float32.onnx", tmp_path / "small.onnx", images)
    export.to_fp16(folder / "float32.onnx", tmp_path / "half.onnx", images)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.onnx", "small.onnx"]
    assert (root.handlers, root.level, logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def one_layer(
    path: Path, operator: str, weight: float, shape: tuple[int, ...] = (4, 3, 1, 1), opset: int = 18, domain: str = ""
) -> Path:
    """A file with one operator that reads `input` (batch, 3, 4, 4) and a constant, then one that scales it back."""
    constants = [np.full(shape, weight, np.float32), np.array(1 / weight, np.float32)]
    nodes = [helper.make_node(operator, ["input", "c0"], ["inner"], domain=domain),
             helper.make_node("Mul", ["inner", "c1"], ["logits"])]
    ins, outs = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, 4, 4])
                 for n, c in (("input", 3), ("logits", 4 if operator == "Conv" else 3)))
    weights = [numpy_helper.from_array(array, f"c{index}") for index, array in enumerate(constants)]
    graph = helper.make_graph(nodes, "one", [ins], [outs], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=8), path)
    return path


def test_values_beyond_float16_are_refused_though_the_cpu_hides_them(tmp_path):
    """onnxruntime computes float16 on the CPU in float32, where 1e6 is a number like any other."""
    images = [torch.rand(2, 3, 4, 4)]
    with pytest.raises(export.NotQuantizable, match=r"the values of inner reach .*e\+06, float16 ends at 65504"):
        export.to_fp16(one_layer(tmp_path / "large.onnx", "Conv", 1e6), tmp_path / "half.onnx", images)
    export.to_fp16(one_layer(tmp_path / "usual.onnx", "Conv", 1e2), tmp_path / "half.onnx", images)


def test_nearest_neighbours_in_float16(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3)).eval()
    export.to_onnx(network, torch.randn(2, 3, 8, 8), tmp_path / "up.onnx")
    small = export.to_fp16(tmp_path / "up.onnx", tmp_path / "half.onnx", [torch.randn(4, 3, 8, 8)])
    assert small.fidelity.sqnr_db > 50


def test_a_transformer_in_float16_does_not_crash_onnxruntime(tmp_path):
    """Whose last fusions would end this process."""
    torch.manual_seed(0)
    model, x = VisionTransformer(32, 16, 1, 2, 64, 64, num_classes=5), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(model.heads.head.weight)
    file = export.to_onnx(model, x, tmp_path / "float32.onnx")
    assert export.to_fp16(file.path, tmp_path / "half.onnx", [x]).fidelity.sqnr_db > 40


def test_a_failure_leaves_the_older_file(tmp_path, folder, images, monkeypatch):
    older = tmp_path / "half.onnx"
    older.write_bytes(b"older")
    monkeypatch.setattr(quantization, "FLOAT16_TOLERANCE", 1e-9)
    with pytest.raises(export.ParityFailed, match="allowed is 1e-09"):
        export.to_fp16(folder / "float32.onnx", older, images)
    monkeypatch.undo()
    real = quantization.convert_float_to_float16

    def wrong(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
        half = real(model, **options)
        kernel = next(tensor for tensor in half.graph.initializer if len(tensor.dims) == 4)
        kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float16(1.2), kernel.name))
        return half

    monkeypatch.setattr(quantization, "convert_float_to_float16", wrong)
    with pytest.raises(export.ParityFailed, match=r"allowed is 0\.01"):
        export.to_fp16(folder / "float32.onnx", older, images)
    monkeypatch.setattr(quantization, "convert_float_to_float16", lambda model, keep_io_types: real(model))
    with pytest.raises(export.NotQuantizable, match="the inputs came out as"):
        export.to_fp16(folder / "float32.onnx", older, images)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("half.onnx", b"older")]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no calibration examples"),
        (torch.zeros(2, 3, 12, 12), r"the batch has shape \(3, 12, 12\), the file takes \('batch', 3, 12, 12\)"),
        ([np.zeros((2, 3, 8, 8), np.float32)], r"shape \(2, 3, 8, 8\)"),
        ([np.zeros((0, 3, 12, 12), np.float32)], r"shape \(0, 3, 12, 12\)"),
        ([np.zeros((2, 3, 12, 12), np.uint8)], "the batch is uint8, the file takes float32"),
        ([torch.full((2, 3, 12, 12), torch.nan)], "values that are not finite"),
    ],
)
@pytest.mark.parametrize("make", [export.quantize, export.to_fp16])
def test_examples_that_do_not_fit_are_refused(tmp_path, folder, make, batches, message):
    with pytest.raises(export.NotQuantizable, match=message):
        make(folder / "float32.onnx", tmp_path / "small.onnx", batches)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_become_smaller_are_refused(tmp_path, folder, made, images):
    two = export.to_onnx(TwoInputs(), (torch.randn(3, 6), torch.tensor([6, 0, 2])), tmp_path / "two.onnx").path
    unweighted = one_layer(tmp_path / "unweighted.onnx", "Add", 1.0, (1,))
    early = one_layer(tmp_path / "early.onnx", "Conv", 1.0, opset=12)
    for path, fact in (
        (two, r"the file takes input_0 tensor\(float\), input_1 tensor\(int64\)"),
        (made["tensorrt"].path, "the file is quantized already"),
        (made["fp16"].path, "the file holds weights in fp16"),
        (unweighted, "the file has no Conv, ConvTranspose, Gemm, MatMul to quantize"),
        (early, "the file has opset 12; int8 weights with a scale per channel need 13"),
    ):
        batches = images if path not in (unweighted, early) else [torch.rand(1, 3, 4, 4)]
        with pytest.raises(export.NotQuantizable, match=fact):
            export.quantize(path, tmp_path / "small.onnx", batches)
    with pytest.raises(export.NotQuantizable, match="target 'arm' is not known"):
        export.quantize(folder / "float32.onnx", tmp_path / "small.onnx", images, target="arm")
    with pytest.raises(export.BadOnnx, match="there is no such file"):
        export.quantize(tmp_path / "absent.onnx", tmp_path / "small.onnx", images)
    with pytest.raises(export.NotExportable, match="the folder does not exist"):
        export.quantize(folder / "float32.onnx", tmp_path / "absent" / "small.onnx", images)
    assert not (tmp_path / "small.onnx").exists()
    image = [np.zeros((1, 3, 12, 12), np.float32)]
    for path, batches, fact in ((two, image, "takes 2 inputs"), (folder / "float32.onnx", [], "nothing to answer"),
                                (folder / "float32.onnx", [image[0][:, :2]], "cannot run the file on")):
        with pytest.raises(export.BadOnnx, match=fact):
            export.answers(path, batches)


@pytest.mark.parametrize("make", [export.quantize, export.to_fp16])
def test_the_standard_domain_may_have_its_other_name(tmp_path, make):
    path = one_layer(tmp_path / "named.onnx", "Conv", 1.0, domain="ai.onnx")
    small = make(path, tmp_path / "small.onnx", [torch.rand(2, 3, 4, 4)])
    assert [entry.domain for entry in onnx.load(small.path).opset_import] == [""]


def test_a_network_without_a_skip_connection_too(tmp_path, images):
    export.to_onnx(plain(16), images[0][:1], tmp_path / "float32.onnx")
    small = export.quantize(tmp_path / "float32.onnx", tmp_path / "int8.onnx", images)
    assert small.fidelity.sqnr_db > 20


class WithScalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.conv(x)
        return x.mean((2, 3)), x.mean()


def test_an_output_that_is_one_number_is_compared_batch_by_batch(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    file = export.to_onnx(WithScalar(), x, tmp_path / "two.onnx")
    assert [output.shape for output in export.answers(file.path, [x.numpy()] * 2)] == [(8, 8), (2,)]
    assert export.quantize(file.path, tmp_path / "int8.onnx", [x, x]).fidelity.sqnr_db > 20


def test_the_float32_file_is_named_with_its_weights_wherever_they_lie(image, tmp_path, monkeypatch):
    monkeypatch.setattr("export.drafts.SINGLE_FILE_LIMIT", 0)
    said = []
    for seed in (0, 1):
        model = plain()
        nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(seed))
        (tmp_path / str(seed)).mkdir()
        file = export.to_onnx(model, image, tmp_path / str(seed) / "net.onnx")
        small = export.quantize(file.path, tmp_path / f"{seed}.onnx", [image])
        (digest,) = (e.value for e in onnx.load(small.path).metadata_props if e.key == "float32_sha256")
        assert digest == file.sha256
        said.append(digest)
    assert said[0] != said[1]


@pytest.mark.parametrize("what", ["outputs without a shape", "weights in constant nodes"])
@pytest.mark.parametrize("make", [export.quantize, export.to_fp16])
def test_files_of_other_exporters_become_smaller_too(tmp_path, folder, images, make, what):
    model = onnx.load(folder / "float32.onnx")
    if what == "outputs without a shape":
        model.graph.output[0].type.tensor_type.ClearField("shape")
    else:
        for weight in model.graph.initializer:
            model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [weight.name], value=weight))
        del model.graph.initializer[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    small = make(tmp_path / "foreign.onnx", tmp_path / "small.onnx", images)
    assert small.fidelity.sqnr_db > 15


def test_nor_does_one_that_casts_its_weights(tmp_path):
    """Such files hold float32 and compute in float16."""
    torch.manual_seed(0)
    model, x = VisionTransformer(32, 16, 1, 2, 64, 64, num_classes=5), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(model.heads.head.weight)
    file = export.to_onnx(model, x, tmp_path / "float32.onnx")
    half = onnx.load(export.to_fp16(file.path, tmp_path / "half.onnx", [x]).path)
    casts = []
    for tensor in half.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            wide = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), f"{tensor.name}.wide")
            casts.append(helper.make_node("Cast", [wide.name], [tensor.name], to=onnx.TensorProto.FLOAT16))
            tensor.CopyFrom(wide)
    nodes = [*casts, *half.graph.node]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    onnx.save(half, tmp_path / "casting.onnx")
    assert export.measure(tmp_path / "casting.onnx", seconds=0.05).median > 0
