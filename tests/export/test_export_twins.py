"""A twin with a fixed batch: no free axis anywhere, the same function, made from the file that was checked."""

import onnx
import pytest
import torch
from tiny_networks import plain
from torch import Tensor, nn

import export


class Tokens(nn.Module):
    """A class token for every image and a reshape by the batch, which a free batch leaves to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).reshape(x.shape[0], 8, -1).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        return self.head(torch.softmax(tokens @ tokens.transpose(1, 2), 2) @ tokens)[:, 0]


class Chosen(nn.Module):
    """As many outputs as there are positive inputs: a shape that depends on values."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, torch.nonzero(x > 0)


def free_axes(path):
    model = onnx.load(path)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    return [value.name for value in values if any(not d.dim_value for d in value.type.tensor_type.shape.dim)]


def test_every_axis_has_a_size_and_the_function_is_the_same(tmp_path, image):
    model = Tokens()
    file = export.to_onnx(model, image, tmp_path / "m.onnx", labels=list("abcde"))
    before = file.path.read_bytes()
    twin = export.static_twin(file.path, tmp_path / "twin.onnx", model, image)
    assert free_axes(file.path)
    assert not free_axes(twin.path)
    free, fixed = ({node.op_type for node in onnx.load(path).graph.node} for path in (file.path, twin.path))
    assert "Shape" in free
    assert "Shape" not in fixed, "what was computed from the batch is constant now"
    assert twin.parity.worst < 1e-5
    assert {row.batch for row in twin.parity.batches} == {1}
    assert file.path.read_bytes() == before
    session = export.sessions.open_session(twin.path)
    assert [(v.name, v.shape) for v in (*session.get_inputs(), *session.get_outputs())] == [
        ("input", [1, 3, 12, 12]), ("logits", [1, 5])
    ]


def test_the_twin_keeps_the_metadata_and_says_its_own_parity(files, tmp_path, network, image):
    twin = export.static_twin(files["small"].path, tmp_path / "twin.onnx", network, image, batch=4)
    old, new = ({e.key: e.value for e in onnx.load(p).metadata_props} for p in (files["small"].path, twin.path))
    assert {key for key in old | new if old.get(key) != new.get(key)} == {"parity"}
    assert new["parity"].endswith("at batch 4")
    again = export.static_twin(files["small"].path, tmp_path / "again.onnx", network, image, batch=4)
    assert again.sha256 == twin.sha256
    assert export.measure(twin.path, batch=4, seconds=0.1).batch == 4


def test_a_twin_of_a_file_with_preprocessing(tmp_path, network, image):
    pre = export.Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    file = export.to_onnx(network, image, tmp_path / "m.onnx", preprocessing=pre)
    twin = export.static_twin(file.path, tmp_path / "twin.onnx", network, image, preprocessing=pre)
    assert not free_axes(twin.path)
    assert twin.parity.worst < 1e-5


def test_the_twin_of_another_network_is_refused_and_leaves_nothing(files, tmp_path, image):
    with pytest.raises(export.ParityFailed, match="the file is wrong by"):
        export.static_twin(files["small"].path, tmp_path / "twin.onnx", plain(seed=1), image)
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_depends_on_values_has_no_twin(tmp_path):
    x = torch.randn(2, 6)
    file = export.to_onnx(Chosen(), x, tmp_path / "m.onnx")
    with pytest.raises(export.NotExportable, match=r"the shape of .* cannot be inferred with batch 1"):
        export.static_twin(file.path, tmp_path / "twin.onnx", Chosen(), x)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_impossible_twins_are_refused(files, tmp_path, network, image):
    source = files["small"].path
    twin = export.static_twin(source, tmp_path / "twin.onnx", network, image)
    (tmp_path / "text.onnx").write_text("not a network")
    for path, batch, error, fact in (
        (source, 0, export.NotExportable, "batch 0 asked"),
        (twin.path, 1, export.NotExportable, "has no free batch"),
        (tmp_path / "text.onnx", 1, export.BadOnnx, "cannot be read"),
        (tmp_path / "absent.onnx", 1, export.BadOnnx, "cannot be read"),
    ):
        with pytest.raises(error, match=fact):
            export.static_twin(path, tmp_path / "new.onnx", network, image, batch=batch)
    with pytest.raises(export.NotExportable, match="folder does not exist"):
        export.static_twin(source, tmp_path / "nowhere" / "m.onnx", network, image)
