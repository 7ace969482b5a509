"""Data by name: what a pass gives, that passes repeat with the seed, and how damaged data is refused."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffprune.data import Batches, load_data
from diffprune.data.arrays import CIFAR10
from diffprune.errors import BadData

SHARED = Path(os.environ.get("DIFFPRUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))
Arrays = dict[str, NDArray[Any]]


def everything(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def numbered(count: int, *shape: int) -> NDArray[np.uint8]:
    """Images of which each is one value, its number: a pass tells which images it gave."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, *shape)).copy()


def cifar(folder: Path, change: Callable[[Arrays], Arrays] = dict) -> Path:
    for index, name in enumerate(["train_1", "train_2", "train_3", "train_4", "train_5", "test"]):
        arrays: Arrays = {"images": numbered(4, 32, 32, 3) + 4 * index, "labels": np.arange(4, dtype=np.uint8)}
        np.savez(folder / f"{name}.npz", **change(arrays))  # type: ignore[arg-type]
    return folder


def npz(folder: Path, **changes: Any) -> Path:
    arrays = {
        "train_images": numbered(10, 6, 5, 3),
        "train_labels": np.arange(10) % 3,
        "val_images": numbered(4, 6, 5, 3),
        "val_labels": np.array([0, 1, 2, 3]),
    } | changes
    np.savez(folder / "d.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder / "d.npz"


def mnist(folder: Path, count: int = 5, **changes: bytes) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = [number.to_bytes(4) for number in (count, 28, 28)]
    for half in ("train", "t10k"):
        files = {
            "images-idx3": bytes((0, 0, 8, 3)) + b"".join(header) + numbered(count, 1, 28, 28).tobytes(),
            "labels-idx1": bytes((0, 0, 8, 1)) + header[0] + bytes(range(count)),
        }
        for name, content in files.items():
            (raw / f"{half}-{name}-ubyte").write_bytes(changes.get(f"{half}_{name[:6]}", content))
    return folder


def picture(path: Path, width: int = 12, height: int = 8, colour: tuple[int, int, int] = (200, 100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


# Every source


@pytest.fixture(params=["digits", "cifar10", "mnist", "npz", "imagefolder"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind: str = request.param
    if kind == "digits":
        return kind
    if kind == "imagefolder":
        for label in "ab":
            for index in range(6):
                picture(tmp_path / "d" / label / f"{index}.png", colour=(index, 0, 0))
        return f"imagefolder:{tmp_path / 'd'}"
    return f"{kind}:{ {'cifar10': cifar, 'mnist': mnist, 'npz': npz}[kind](tmp_path)}"


def test_each_source_keeps_the_contract(spec: str) -> None:
    data = load_data(spec, batch=4, image_size=9)
    assert data.input_shape[1:] == (9, 9)
    for side in (data.train, data.val):
        images, labels = everything(side)
        assert images.shape[1:] == data.input_shape
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert int(labels.max()) < len(data.labels)
        assert len(list(side)) == len(side)
        left_out = side.examples % 4 if side is data.train and side.examples > 4 else 0
        assert len(images) == side.examples - left_out
    assert len(data.mean) == len(data.std) == data.input_shape[0]


def test_the_same_seed_gives_the_same_passes(spec: str) -> None:
    one, other = (load_data(spec, batch=4, image_size=9, seed=5).train for _ in range(2))
    first, second = everything(one), everything(one)
    assert torch.equal(first[0], everything(other)[0])
    next(iter(other))  # a pass given up half-way counts as one, whatever it drew
    assert not torch.equal(first[0], second[0])
    third = everything(one)
    assert torch.equal(third[0], everything(other)[0])
    assert not torch.equal(first[0], everything(load_data(spec, batch=4, image_size=9, seed=6).train)[0])


def test_what_is_held_out_does_not_depend_on_the_seed(spec: str) -> None:
    one, other = (everything(load_data(spec, image_size=9, seed=seed).val) for seed in (0, 1))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_loading_leaves_the_global_generator_alone(spec: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    everything(load_data(spec, image_size=9).train)
    assert torch.equal(before, torch.get_rng_state())


# One source at a time


def test_digits_hold_out_a_quarter_of_each_digit() -> None:
    data = load_data("digits", batch=3)  # which divides both halves: training leaves out what does not fill a batch
    assert data.input_shape == (1, 16, 16)
    assert data.train.examples + data.val.examples == 1797
    assert abs(data.val.examples - 1797 / 4) < 5
    train, val = (everything(side) for side in (data.train, data.val))
    share = torch.bincount(val[1]) / (torch.bincount(val[1]) + torch.bincount(train[1]))
    assert torch.allclose(share, torch.tensor(0.25), atol=0.01)
    assert abs(float(train[0].mean())) < 0.05


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BadData, match=r"scikit-learn, which is not installed(.|\n)*pip install diffprune\[demo\]"):
        load_data("digits")


def test_cifar_values_and_normalisation(tmp_path: Path) -> None:
    data = load_data(f"cifar10:{cifar(tmp_path)}", augment=False)
    assert data.labels == CIFAR10
    images, labels = everything(data.val)
    assert labels.tolist() == [0, 1, 2, 3]
    expected = (torch.arange(20, 24).view(4, 1) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert torch.allclose(images, expected.view(4, 3, 1, 1).expand(4, 3, 32, 32))
    assert sorted(everything(data.train)[1].tolist()) == sorted([0, 1, 2, 3] * 5)


def test_cifar_training_images_are_moved_and_mirrored(tmp_path: Path) -> None:
    """Every augmented image is one of the 9 x 9 x 2 windows of its padded original."""
    original = np.random.default_rng(0).integers(1, 256, (1, 32, 32, 3), dtype=np.uint8)
    folder = cifar(tmp_path, lambda arrays: {"images": np.repeat(original, 40, 0), "labels": np.zeros(40, np.int64)})
    data = load_data(f"cifar10:{folder}")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    seen = ((everything(data.train)[0] * std + mean) * 255).round().to(torch.uint8)
    padded = torch.nn.functional.pad(torch.from_numpy(original[0]).permute(2, 0, 1), (4, 4, 4, 4))
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            windows[window.numpy().tobytes()] = (top, left, False)
            windows[window.flip(2).numpy().tobytes()] = (top, left, True)
    found = [windows[image.numpy().tobytes()] for image in seen]
    for place, count in ((0, 9), (1, 9), (2, 2)):
        assert len({entry[place] for entry in found}) == count
    assert len(set(found)) > 80


def test_mnist_values(tmp_path: Path) -> None:
    data = load_data(f"mnist:{mnist(tmp_path)}")
    assert data.input_shape == (1, 28, 28)
    images, labels = everything(data.val)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(images[:, 0, 0, 0], (torch.arange(5) / 255 - 0.1307) / 0.3081)


def test_npz_takes_its_mean_and_std_from_the_training_images_or_the_file(tmp_path: Path) -> None:
    data = load_data(f"npz:{npz(tmp_path)}")
    assert data.labels == ("0", "1", "2", "3")
    images = everything(data.train)[0]
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    given = load_data(f"npz:{npz(tmp_path, mean=np.full(3, 0.5), std=np.full(3, 0.25))}")
    assert (given.mean, given.std) == ((0.5,) * 3, (0.25,) * 3)


def test_npz_of_floats_is_taken_as_it_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(4, 2, 6, 5))
    data = load_data(f"npz:{npz(tmp_path, train_images=np.zeros((10, 2, 6, 5)), val_images=images)}")
    assert data.input_shape == (2, 6, 5)
    assert torch.equal(everything(data.val)[0], torch.from_numpy(images).float())


def test_a_last_training_batch_of_one_is_left_out_but_no_validation_example(tmp_path: Path) -> None:
    data = load_data(f"npz:{npz(tmp_path)}", batch=3)
    assert [len(labels) for _, labels in data.train] == [3, 3, 3]
    assert [len(labels) for _, labels in data.val] == [3, 1]
    assert (len(data.train), len(data.val), data.train.examples, data.val.examples) == (3, 2, 10, 4)


def test_imagefolder_with_train_and_val(tmp_path: Path) -> None:
    for half, colour in (("train", (10, 20, 30)), ("val", (40, 50, 60))):
        for label in ("cat", "dog"):
            picture(tmp_path / half / label / "one.JPG", colour=colour)
            picture(tmp_path / half / label / "two.png", width=8, height=20, colour=colour)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not a picture")
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.labels == ("cat", "dog")
    assert data.input_shape == (3, 224, 224)
    images, labels = everything(data.val)
    assert labels.tolist() == [0, 0, 1, 1]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    colours = (images * std + mean) * 255
    assert torch.allclose(colours, torch.tensor([40.0, 50.0, 60.0]).view(3, 1, 1).expand_as(colours), atol=3)


def test_images_to_train_on_may_have_no_labels(tmp_path: Path, user: str) -> None:
    for number in range(3):
        picture(tmp_path / "pictures" / "train" / f"{number}.png")
        picture(tmp_path / "pictures" / "val" / f"class {number}" / "a.png")
    specs = f"npz:{npz(tmp_path, train_labels=None)}", f"imagefolder:{tmp_path / 'pictures'}", f"{user}:unlabelled"
    for spec, classes, examples in zip(specs, (4, 3, 2), (10, 3, 5), strict=True):
        data = load_data(spec, batch=2)
        assert (len(data.labels), data.train.examples) == (classes, examples)
        for images, labels in data.train:
            assert images.shape[1:] == data.input_shape
            assert labels is None
        assert everything(data.val)[1].max() == classes - 1


def test_imagefolder_takes_the_centre(tmp_path: Path) -> None:
    """A picture of three stripes, three times as wide as high: the centre is the middle stripe alone."""
    for index in range(5):
        path = tmp_path / "a" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        stripes = np.zeros((64, 192, 3), dtype=np.uint8)
        stripes[:, 64:128] = 255
        Image.fromarray(stripes).save(path)
    data = load_data(f"imagefolder:{tmp_path}", image_size=32, augment=False)
    assert (data.train.examples, data.val.examples) == (4, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    assert torch.allclose(everything(data.train)[0] * std + mean, torch.ones(1), atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("spec", "fact"),
    [
        ("digit", r"there is no data 'digit'(.|\n)*did you mean digits\?"),
        ("cifar10", r"there is no data 'cifar10'(.|\n)*did you mean cifar10:PATH\?"),
        ("npz:", r"there is no data 'npz:'"),
        ("digits:8", r"there is no data 'digits:8'"),
        ("mnist:absent", r"cannot be read: No such file(.|\n)*MNIST"),
        ("npz:absent.npz", "the file is missing"),
        ("imagefolder:absent", "the folder is missing"),
        ("cifar10:absent", r"files missing: train_1.npz, (.|\n)*cifar-10-batches-py are not read"),
        ("no_such_package_anywhere:f", "there is no module no_such_package_anywhere"),
    ],
)
def test_names_that_lead_to_no_data(spec: str, fact: str) -> None:
    with pytest.raises(BadData, match=fact):
        load_data(spec)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"images": np.zeros((4, 28, 28, 3), np.uint8)}, r"images are \(4, 28, 28, 3\) uint8, not \(N, 32, 32, 3\)"),
        ({"images": np.zeros((4, 32, 32, 3))}, r"images are \(4, 32, 32, 3\) float64, not"),
        ({"labels": np.array([0, 1, 2, 10])}, "a label is 10, but there are 10 classes"),
        ({"labels": np.zeros(3, np.int64)}, r"4 images but labels of shape \(3,\)"),
    ],
)
def test_cifar_of_the_wrong_shape(tmp_path: Path, changes: Arrays, fact: str) -> None:
    with pytest.raises(BadData, match=fact):
        load_data(f"cifar10:{cifar(tmp_path, lambda arrays: arrays | changes)}")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"train_images": np.zeros((0, 6, 5, 3), np.uint8), "train_labels": None}, "there are no images"),
        ({"val_labels": None, "train_images": None}, "arrays missing: train_images, val_labels; the file has"),
        ({"val_images": np.zeros((4, 6, 6, 3), np.uint8)}, r"training images are \(\(3, 6, 5\).*validation images"),
        ({"train_images": np.zeros((10, 6, 5), np.uint8)}, r"images are \(10, 6, 5\) uint8"),
        ({"train_images": np.zeros((10, 6, 5, 3), np.int32)}, "images are .* int32"),
        ({"train_images": np.zeros((10, 3, 6, 5), np.uint8)}, "channels on the wrong axis"),
        ({"train_images": np.zeros((10, 6, 5, 3))}, "channels on the wrong axis"),
        ({"train_images": np.full((10, 3, 6, 5), np.nan)}, "not finite"),
        ({"train_labels": np.zeros(10)}, "labels are float64, not integers"),
        ({"train_labels": np.full(10, -1)}, "labels go from -1 to -1"),
        ({"train_labels": np.full(10, 10**9)}, "labels go from 1000000000"),
        ({"val_images": np.zeros((0, 6, 5, 3), np.uint8), "val_labels": np.zeros(0, int)}, "there are no images"),
        ({"mean": np.zeros(3)}, "do not normalise 3 channels"),
        ({"mean": np.zeros(3), "std": np.zeros(3)}, "do not normalise 3 channels"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path: Path, changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(BadData, match=fact):
        load_data(f"npz:{npz(tmp_path, **changes)}")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}] * 10, dtype=object)
    with pytest.raises(BadData, match="cannot be read: Object arrays cannot be loaded"):
        load_data(f"npz:{npz(tmp_path, train_labels=objects)}")
    (tmp_path / "p.npz").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BadData, match="cannot be read"):
        load_data(f"npz:{tmp_path / 'p.npz'}")


@pytest.mark.parametrize("part", [0, 10, 300, -30])
def test_a_damaged_npz_is_refused(tmp_path: Path, part: int) -> None:
    path = npz(tmp_path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(BadData, match="the file cannot be read"):
        load_data(f"npz:{path}")


def test_a_lone_array_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros(3))
    with pytest.raises(BadData, match="the file cannot be read"):
        load_data(f"npz:{tmp_path / 'd.npy'}")


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", bytes((0, 0, 8, 3, 0, 0, 0, 5)), bytes(5000)])
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadData, match="the file is damaged: not 3 axes of unsigned bytes"):
        load_data(f"mnist:{mnist(tmp_path, train_images=content)}")


def test_mnist_of_another_size(tmp_path: Path) -> None:
    small = bytes((0, 0, 8, 3)) + b"".join(number.to_bytes(4) for number in (1, 2, 2)) + bytes(4)
    with pytest.raises(BadData, match=r"images are \(2, 2\), not \(28, 28\)"):
        load_data(f"mnist:{mnist(tmp_path, train_images=small)}")
    tall = tmp_path / "tall"
    with pytest.raises(BadData, match="a label is 10, but there are 10 classes"):
        load_data(f"mnist:{mnist(tall, count=11)}")


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"there are no folders of classes in \."):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(BadData, match="there are no pictures in cat"):
        load_data(f"imagefolder:{tmp_path}")
    picture(tmp_path / "cat" / "a.png")
    with pytest.raises(BadData, match="no class has the 3 pictures"):
        load_data(f"imagefolder:{tmp_path}")


def test_halves_that_do_not_match(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(BadData, match="the folder val is missing"):
        load_data(f"imagefolder:{tmp_path}")
    picture(tmp_path / "val" / "dog" / "a.png")
    with pytest.raises(BadData, match="classes only in val: dog"):
        load_data(f"imagefolder:{tmp_path}")


def test_an_unreadable_picture_is_named_within_its_folder(tmp_path: Path) -> None:
    for half in ("train", "val"):
        picture(tmp_path / half / "cat" / "a.png", 64, 64)
    whole = (tmp_path / "train" / "cat" / "a.png").read_bytes()
    for content in (b"not a picture", whole[: len(whole) // 2], b""):
        (tmp_path / "val" / "cat" / "a.png").write_bytes(content)
        with pytest.raises(BadData, match=r"the picture val/cat/a\.png cannot be read"):
            list(load_data(f"imagefolder:{tmp_path}").val)


def test_pixels_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    for half in ("train", "val"):
        picture(tmp_path / half / "cat" / "a.png", 64, 64)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "val" / "cat" / "a.png")
    with pytest.raises(BadData, match="more than 8 bits"):
        list(load_data(f"imagefolder:{tmp_path}").val)


def test_a_class_whose_name_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    for half in ("train", "val"):
        picture(tmp_path / half / "caf\udce9" / "a.png", 64, 64)
    with pytest.raises(BadData, match="not UTF-8"):
        load_data(f"imagefolder:{tmp_path}")


# The user's own

USER = """
import torch
from diffprune.data import Data, Batches
def side(n, shape=(3, 8, 8), dtype=torch.float64, label=1):
    return [(torch.ones(2, *shape, dtype=dtype), torch.tensor([0, label])) for _ in range(n)]
def good(): return side(3), side(2)
def ready():
    batches = Batches(2, 1, lambda: iter(side(1)))
    return Data(batches, batches, ("a", "b"), (3, 8, 8), (0.0,) * 3, (1.0,) * 3)
def numpys():
    import numpy
    half = numpy.full(3, 0.5, numpy.float32)
    return Data(ready().train, ready().val, [0, 1], torch.Size((3, 8, 8)), half, torch.from_numpy(half))
def flat():
    return Data(ready().train, ready().val, ("a", "b"), (8, 8), 0.5, 0.5)
def empty(): return Data(side(2), side(0), ("a", "b"), (3, 8, 8), (0.0,) * 3, (1.0,) * 3)
def spent(): return Data(side(2), iter(side(2)), ("a", "b"), (3, 8, 8), (0.0,) * 3, (1.0,) * 3)
def once(): return iter(side(3)), side(2)
def one(): return side(3)
def nothing(): return side(0), side(2)
def number(): return 3, side(2)
def bare(): return ["images"], side(2)
def unlabelled(): return [torch.ones(2, 3, 8, 8), (torch.ones(3, 3, 8, 8),)], side(2)
def blind(): return side(2), [torch.ones(2, 3, 8, 8)]
def whole(): return side(1, dtype=torch.uint8), side(2)
def sizes(): return side(1, (3, 9, 9)), side(2)
def mixed(): return side(1, (3, 9, 9)) + side(1), side(2)
def below(): return side(1, label=-1), side(2)
def floats(): return [(torch.ones(2, 3, 8, 8), torch.ones(2))], side(2)
def broken(): raise RuntimeError("no luck")
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_data_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_users_batches(user: str) -> None:
    data = load_data(f"{user}:good")
    assert (data.train.examples, len(data.train), data.val.examples, len(data.val)) == (6, 3, 4, 2)
    assert (data.input_shape, data.labels) == ((3, 8, 8), ("0", "1"))
    for _ in range(2):
        images, labels = everything(data.train)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert load_data(f"{user}:ready").labels == ("a", "b")
    given = load_data(f"{user}:numpys")
    assert json.dumps([given.labels, given.input_shape, given.mean, given.std]) == (
        '[["0", "1"], [3, 8, 8], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]'
    )


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("once", "list_iterator can be iterated only once"),
        ("empty", "there are no validation batches, or only once"),
        ("spent", "there are no validation batches, or only once"),
        ("flat", r"input_shape \(8, 8\), mean 0.5 or std 0.5 are not numbers, one per channel"),
        ("one", r"the function returned list, not \(train, val\)"),
        ("nothing", "there are no batches"),
        ("number", "int is not a series of batches"),
        ("bare", "a batch is no pair of tensors"),
        ("blind", "validation batches have no labels"),
        ("whole", r"images are \(2, 3, 8, 8\) torch.uint8"),
        ("sizes", r"training images are \(3, 9, 9\), validation images \(3, 8, 8\)"),
        ("mixed", r"images are \(3, 9, 9\), then \(3, 8, 8\)"),
        ("below", "labels are torch.int64, from -1 to 0"),
        ("floats", "labels are torch.float32"),
        ("broken", "calling it raised RuntimeError: no luck"),
        ("goood", r"has no goood(.|\n)*did you mean"),
    ],
)
def test_the_users_function_gives_something_else(user: str, name: str, fact: str) -> None:
    with pytest.raises(BadData, match=fact):
        load_data(f"{user}:{name}")


def test_batches_of_nothing() -> None:
    with pytest.raises(BadData, match="batches of 0 images were asked for"):
        load_data("digits", batch=0)


def test_an_image_size_that_the_users_data_does_not_have(user: str) -> None:
    assert load_data(f"{user}:good", image_size=8).input_shape == (3, 8, 8)
    with pytest.raises(BadData, match=r"image size 9 was asked for; the function gives \(3, 8, 8\)"):
        load_data(f"{user}:good", image_size=9)


# Real files


@pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason="the shared data folder (DIFFPRUNE_DATA) is not here")
def test_real_mnist() -> None:
    data = load_data(f"mnist:{SHARED}", batch=1000)
    assert (data.train.examples, data.val.examples) == (60_000, 10_000)
    images, labels = everything(data.val)
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01
    assert torch.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="the shared data folder (DIFFPRUNE_DATA) is not here")
def test_real_cifar() -> None:
    data = load_data(f"cifar10:{SHARED / 'cifar10'}", batch=1000)
    assert (data.train.examples, data.val.examples) == (50_000, 10_000)
    assert torch.bincount(everything(data.val)[1]).tolist() == [1000] * 10
