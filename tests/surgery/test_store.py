"""Saving and loading: the same bytes and outputs, and one clear error for every file that is not what it should be."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from oracle import random_keep, relative_error, run
from torch import nn
from zoo import ZOO, Plain, Residual, randomised, traced

import surgery
from surgery.cut import RECEIPT
from surgery.store import FORMAT

NETWORKS = (
    "plain", "residual", "dense_concat", "depthwise", "grouped", "transposed", "tied_weight", "bare_scale",
    "buffer_scale", "prelu_sigmoid", "class_token", "c2f", "layer_norm_mlp",
)


def small_network(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    model, graph, x = traced(name)
    return surgery.cut(model, graph, random_keep(graph, seed)), x


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape
        and left[n].contiguous().numpy().tobytes() == right[n].contiguous().numpy().tobytes() for n in left
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_network_is_the_saved_one(name: str, tmp_path: Path) -> None:
    small, x = small_network(name)
    surgery.save(small, tmp_path / "a.safetensors")
    loaded = surgery.load(tmp_path / "a.safetensors", ZOO[name].build).eval()
    assert same_bytes(small, loaded)
    assert relative_error(run(small, x), run(loaded, x)) == 0.0
    surgery.save(loaded, str(tmp_path / "b.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_cut_is_stored_against_the_dense_network(name: str, tmp_path: Path) -> None:
    once, x = small_network(name)
    graph = surgery.trace(once, x)
    twice = surgery.cut(once, graph, random_keep(graph, 1))
    surgery.save(twice, tmp_path / "twice.safetensors")
    loaded = surgery.load(tmp_path / "twice.safetensors", ZOO[name].build)
    assert same_bytes(twice, loaded)
    receipt = getattr(twice, RECEIPT)
    assert getattr(loaded, RECEIPT) == receipt
    dense, small = (m.state_dict() for m in (randomised(ZOO[name].build()).double(), twice))
    for tensor, axes in receipt.kept.items():
        expected = dense[tensor]
        assert tuple(expected.shape) == receipt.shapes[tensor]
        for axis, index in axes.items():
            expected = expected.index_select(axis, torch.tensor(index))
        assert torch.equal(expected, small[tensor])


def test_a_network_is_stored_as_it_is_after_fine_tuning(tmp_path: Path) -> None:
    small, x = small_network("residual")
    small.train()
    small(x).square().sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    surgery.save(small, tmp_path / "tuned.safetensors")
    assert same_bytes(small, surgery.load(tmp_path / "tuned.safetensors", Residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_that_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = randomised(Plain()).to(dtype).eval(), torch.randn(2, 3, 8, 8).to(dtype)
    graph = surgery.trace(model, x)
    small = surgery.cut(model, graph, random_keep(graph, 0))
    surgery.save(small, tmp_path / "half.safetensors")
    loaded = surgery.load(tmp_path / "half.safetensors", Plain).eval()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(small(x), loaded(x))


def test_mode_and_flags_are_the_factorys(tmp_path: Path) -> None:
    small, _ = small_network("residual")
    surgery.save(small, tmp_path / "a.safetensors")
    loaded = surgery.load(tmp_path / "a.safetensors", lambda: Residual().requires_grad_(False))
    assert loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_loaded_network_can_be_cut_and_saved_again(tmp_path: Path) -> None:
    small, x = small_network("residual")
    surgery.save(small, tmp_path / "a.safetensors")
    loaded = surgery.load(tmp_path / "a.safetensors", Residual).eval()
    graph = surgery.trace(loaded, x)
    smaller = surgery.cut(loaded, graph, random_keep(graph, 5))
    surgery.save(smaller, tmp_path / "b.safetensors")
    assert same_bytes(smaller, surgery.load(tmp_path / "b.safetensors", Residual))


class Bomb:
    """Unpickling this would be noticed."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def with_record(metadata: dict[str, str]) -> bytes:
    return safetensors.torch.save({"a": torch.ones(3)}, metadata)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda data: data[:-100], "cannot be read"),
    "head only": (lambda data: data[:40], "cannot be read"),
    "empty": (lambda data: b"", "cannot be read"),
    "header overwritten": (lambda data: data[:8] + b"?" * 50 + data[58:], "cannot be read"),
    "length overwritten": (lambda data: b"\xff" * 8 + data[8:], "cannot be read"),
    "pickle": (lambda data: pickle.dumps(Bomb()), "cannot be read"),
    "foreign": (lambda data: safetensors.torch.save({"a": torch.ones(3)}), "not written by surgery.save"),
    "foreign with metadata": (lambda data: with_record({"format": "pt"}), "not written by surgery.save"),
    "no plan": (lambda data: with_record({FORMAT: ""}), "the record of the cut is damaged"),
    "odd plan": (lambda data: with_record({FORMAT: "[1, 2]"}), "the record of the cut is damaged"),
    "no kept": (lambda data: with_record({FORMAT: '{"a": {"shape": [3]}}'}), "the record of the cut is damaged"),
    **{
        f"indices {index} on axis {axis}": (
            lambda data, a=axis, i=index: with_record({FORMAT: f'{{"a": {{"shape": [3], "kept": {{"{a}": {i}}}}}}}'}),
            r"the record of the cut is damaged \(",
        )
        for axis, index in (
            (0, "[0, 3]"), (0, "[-1, 1]"), (0, "[1, 0]"), (0, "[1, 1]"), (0, "[]"), (1, "[0]"), (-1, "[0]"),
        )
    },
}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"a.weight": 3}, "weight of Conv2d is no size"),
        ({"a.forward": 7}, "forward of Conv2d is no size"),
        ({"a.padding[x]": 1}, "the network has no place for the cut"),
        ({"a.padding[7]": 1}, "the network has no place for the cut"),
        ({"a.groups": 0}, r"the record of the cut is damaged \(the size a.groups\)"),
    ],
    ids=str,
)
def test_a_size_that_is_none_is_refused(size: dict[str, int], message: str, tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    small, _ = small_network("residual")
    setattr(small, RECEIPT, replace(getattr(small, RECEIPT), sizes=size))
    surgery.save(small, file)
    with pytest.raises(surgery.BadFile, match=message):
        surgery.load(file, Residual)


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_or_foreign_file_is_refused(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    surgery.save(small_network("residual")[0], file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(surgery.BadFile, match=message):
        surgery.load(file, Residual)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.BadFile, match=r"nowhere\.safetensors cannot be read"):
        surgery.load(tmp_path / "nowhere.safetensors", Residual)


def wider() -> nn.Module:
    model = Residual()
    model.a = nn.Conv2d(8, 7, 3, padding=1)
    return model


def longer() -> nn.Module:
    model = Residual()
    model.extra = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("factory", "message"),
    [(Plain, "has shape None in the network"), (wider, r"a\.bias has shape \(7,\) in the network; \(6,\) was cut"),
     (longer, "2 tensors are only in one of file and network: extra.bias, extra.weight")],
)
def test_the_wrong_factory_is_refused(factory: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    surgery.save(small_network("residual")[0], tmp_path / "a.safetensors")
    with pytest.raises(surgery.BadFile, match=message):
        surgery.load(tmp_path / "a.safetensors", factory)


def test_what_was_not_cut_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(surgery.BadFile, match="Residual has no record of what was cut"):
        surgery.save(Residual(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    surgery.save(small_network("residual", 0)[0], file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("surgery.store.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            surgery.save(small_network("residual", 1)[0], file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    model, x = Plain().double().eval(), ZOO["plain"].example()
    small = surgery.cut(model, surgery.trace(model, x), {})
    with pytest.raises(surgery.BadFile, match=r"there is no folder .*absent"):
        surgery.save(small, tmp_path / "absent" / "small.safetensors")
