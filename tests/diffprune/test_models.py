"""Networks by name: what is built, and how everything that cannot be built or loaded is refused."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision.models
from safetensors.torch import save_file
from torch import nn

from diffprune.errors import BadModel, BadWeights
from diffprune.models import load_model

SHARED = Path(os.environ.get("DIFFPRUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))

USER = '''
import torch
calls = []
number = 3
def build(): return torch.nn.Linear(4, 2)
def sized(num_classes): return torch.nn.Linear(4, num_classes)
def wrong(): return "a network"
def broken(): raise RuntimeError("no luck")
class Net(torch.nn.Sequential): pass
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, of a name of its own for each test."""
    name = f"user_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_demo_network_takes_small_grey_images() -> None:
    model = load_model("digits:resnet18", num_classes=7).eval()
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in model.modules())


def test_torchvision_network_with_other_classes() -> None:
    model = load_model("torchvision:squeezenet1_1", num_classes=5).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.filterwarnings("error")
def test_auxiliary_heads_are_left_out_so_that_training_gives_one_tensor() -> None:
    model = load_model("torchvision:googlenet", num_classes=3)
    assert not any(name.startswith("aux") for name, _ in model.named_parameters())
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_a_network_of_the_users_keeps_weights_that_torchvisions_of_that_name_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\ndef googlenet(): return nn.ModuleDict(dict(aux1=nn.Linear(2, 2), fc=nn.Linear(2, 2)))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("their_nets:googlenet")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert same(load_model("their_nets:googlenet", weights="w.safetensors"), model)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_come_back_from_each_kind_of_file(tmp_path: Path, name: str) -> None:
    model = load_model("digits:resnet18")
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    assert same(load_model("digits:resnet18", weights=str(path)), model)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_inside_a_checkpoint(tmp_path: Path, user: str, key: str) -> None:
    model = load_model(f"{user}:build")
    torch.save({"epoch": 3, key: model.state_dict()}, tmp_path / "w.pt")
    assert same(load_model(f"{user}:build", weights=str(tmp_path / "w.pt")), model)


def test_weights_of_dropped_heads_are_dropped_too(tmp_path: Path) -> None:
    full = torchvision.models.googlenet(num_classes=2, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "w.pt")
    model = load_model("torchvision:googlenet", weights=str(tmp_path / "w.pt"), num_classes=2)
    assert torch.equal(model.get_parameter("conv1.conv.weight"), full.conv1.conv.weight)


def test_the_users_factory_runs(user: str) -> None:
    assert load_model(f"{user}:build").get_parameter("weight").shape == (2, 4)
    assert load_model(f"{user}:build", num_classes=9).get_parameter("weight").shape == (2, 4)
    assert load_model(f"{user}:sized", num_classes=9).get_parameter("weight").shape == (9, 4)
    assert isinstance(load_model(f"{user}:Net"), nn.Sequential)


@pytest.mark.parametrize(
    ("spec", "fact"),
    [
        ("resnet18", r"'resnet18' does not name a network"),
        (":x", "does not name a network"),
        ("torchvision:resnet8", r"there is no network 'resnet8'(.|\n)*nearest name is resnet18"),
        ("torchvision:fcn_resnet50", "there is no network 'fcn_resnet50'"),
        ("digits:qqq", r"there is no network 'qqq'(.|\n)*one of resnet18"),
        ("no_such_package_anywhere.net:build", "there is no module no_such_package_anywhere.net"),
        ("USER:bild", r"has no bild(.|\n)*did you mean user_\d+:build"),
        ("USER:number", r"number is int, not a function"),
        ("USER:wrong", r"the factory returned str, not a torch.nn.Module"),
        ("USER:broken", r"calling it raised RuntimeError: no luck"),
        ("USER:sized", r"calling it raised TypeError"),
    ],
)
def test_names_that_lead_to_no_network(user: str, spec: str, fact: str) -> None:
    with pytest.raises(BadModel, match=fact):
        load_model(spec.replace("USER", user))


@pytest.mark.parametrize(
    ("code", "fact"),
    [("import not_installed_at_all", "No module named 'not_installed_at_all'"), ("1 / 0", "ZeroDivisionError"),
     ("raise SystemExit(0)", "SystemExit")],
)
def test_a_users_module_that_fails_to_import(user: str, tmp_path: Path, code: str, fact: str) -> None:
    (tmp_path / f"{user}_bad.py").write_text(code)
    with pytest.raises(BadModel, match=f"importing {user}_bad failed: .*{fact}"):
        load_model(f"{user}_bad:build")


class Foreign:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return _mark, (os.environ["DIFFPRUNE_MARK"], "run")


def _mark(path: str, text: str) -> None:
    Path(path).write_text(text)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_foreign_object_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("DIFFPRUNE_MARK", str(mark))
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {}, "extra": Foreign()}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(BadWeights, match=r"holds a pickled \S*_mark, and unpickling foreign objects can run any code"):
        load_model("digits:resnet18", weights=str(path))
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file does run code, so the refusal above meant something"


def test_a_bare_pickle_is_refused(tmp_path: Path, user: str) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Foreign, protocol=2))
    with pytest.raises(BadWeights, match=r"damaged or not a weights file|unpickling foreign objects"):
        load_model(f"{user}:build", weights=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("part", [0, 7, 100, -20])
def test_damaged_files_are_refused(tmp_path: Path, user: str, name: str, part: int) -> None:
    path = tmp_path / name
    state = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(BadWeights, match=r"the file is damaged or not a weights file: .(.|\n)*no weights were loaded"):
        load_model(f"{user}:build", weights=str(path))


def test_weights_that_are_not_there(tmp_path: Path, user: str) -> None:
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(BadWeights, match="cannot be read: No such file"):
            load_model(f"{user}:build", weights=str(tmp_path / name))


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_a_state_dict(tmp_path: Path, user: str, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(BadWeights, match="the file holds no state dict"):
        load_model(f"{user}:build", weights=str(tmp_path / "w.pt"))


def test_weights_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    state = load_model("digits:resnet18").state_dict()
    state = OrderedDict((key, value.clone()) for key, value in state.items() if not key.startswith("layer1.0.bn1"))
    state["fc.weight"] = torch.ones(5, 512)
    state |= {f"head.{index}": torch.ones(1) for index in range(4)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadWeights) as caught:
        load_model("digits:resnet18", weights=str(tmp_path / "w.safetensors"))
    message = str(caught.value)
    assert "4 missing: layer1.0.bn1.weight, layer1.0.bn1.bias, layer1.0.bn1.running_mean, ..." in message
    assert "4 unexpected: head.0, head.1, head.2, ..." in message
    assert "1 of the wrong shape: fc.weight is (5, 512), needs (10, 512)" in message


def test_named_weights_need_torchvision() -> None:
    with pytest.raises(BadWeights, match="'DEFAULT' is not a weights file"):
        load_model("digits:resnet18", weights="DEFAULT")
    with pytest.raises(BadWeights, match=r"there are no weights 'BEST'(.|\n)*DEFAULT, IMAGENET1K_V1"):
        load_model("torchvision:squeezenet1_1", weights="BEST")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision looks for SqueezeNet's pretrained weights before it downloads them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


def test_pretrained_weights_keep_all_but_a_head_of_another_size(cache: Path) -> None:
    stored = torchvision.models.squeezenet1_1()
    torch.save(stored.state_dict(), cache)
    assert same(load_model("torchvision:squeezenet1_1", weights="DEFAULT"), stored)
    assert same(load_model("torchvision:squeezenet1_1", weights="IMAGENET1K_V1", num_classes=1000), stored)
    torch.manual_seed(3)
    model = load_model("torchvision:squeezenet1_1", weights="DEFAULT", num_classes=6).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6)
    differ = [key for key, value in model.state_dict().items() if not torch.equal(value, stored.state_dict()[key])]
    assert differ == ["classifier.1.weight", "classifier.1.bias"]
    torch.manual_seed(3)
    assert same(load_model("torchvision:squeezenet1_1", weights="DEFAULT", num_classes=6), model)


def test_a_foreign_object_in_the_cache_is_not_run(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFPRUNE_MARK", str(tmp_path / "mark"))
    torch.save({"x": Foreign()}, cache)
    with pytest.raises(BadWeights, match="could not be downloaded or read"):
        load_model("torchvision:squeezenet1_1", weights="DEFAULT")
    assert not (tmp_path / "mark").exists()


def test_no_network_names_the_cause(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(BadWeights, match="could not be downloaded or read: Name or service not known"):
        load_model("torchvision:squeezenet1_1", weights="DEFAULT")


def test_real_imagenet_weights_fit() -> None:
    path = SHARED / "weights" / "imagenet_squeezenet1_1.safetensors"
    if not path.exists():
        pytest.skip("the shared data folder (DIFFPRUNE_DATA) is not here")
    load_model("torchvision:squeezenet1_1", weights=str(path))
