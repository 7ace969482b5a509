"""Settings: what is allowed, how each refusal reads, and TOML that gives the same settings back."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffprune import config
from diffprune.config import Config, config_from, load_config, portable, to_toml
from diffprune.errors import BadConfig

LEAST: dict[str, Any] = {"model": "digits:resnet18", "data": "digits", "macs": 0.5, "output": "runs/a"}

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
positive = st.floats(min_value=1e-12, max_value=1e300)
share = st.floats(min_value=0, max_value=1, exclude_min=True)
budgets = st.one_of(
    st.builds(lambda value: {"macs": value}, share),
    st.builds(lambda value: {"params": value}, share),
    st.builds(lambda value: {"speedup": value}, st.floats(min_value=1, max_value=100, exclude_min=True)),
)
settings = st.fixed_dictionaries(
    {"model": text, "data": text, "output": text},
    optional={
        "weights": text,
        "epochs": st.one_of(st.integers(0, 500), positive),
        "parent_epochs": st.integers(0, 500),
        "batch": st.integers(1, 2**16),
        "image_size": st.integers(1, 4096),
        "lr": positive,
        "precision": st.sampled_from(["float32", "bfloat16"]),
        "gate": st.sampled_from(["diffprune", "diffprune-deterministic", "hard-concrete"]),
        "round_to": st.one_of(st.integers(1, 64), st.just("auto")),
        "threads": st.integers(1, 64),
        "latency_batch": st.integers(1, 512),
        "device": st.sampled_from(["cpu", "cuda"]),
        "seed": st.integers(0, 2**32 - 1),
        "license": text,
        "static_twin": st.booleans(),
        "preprocessing": st.booleans(),
    },
)


@given(settings, budgets)
def test_toml_gives_the_same_settings_back(tmp_path_factory: pytest.TempPathFactory, values: Any, budget: Any) -> None:
    asked = config_from(values | budget)
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(to_toml(asked).encode())
    assert load_config(path) == asked
    assert to_toml(load_config(path)) == to_toml(asked)


def test_every_ascii_character_comes_back(tmp_path: Path) -> None:
    asked = config_from(LEAST | {"output": "".join(map(chr, range(128)))})
    (tmp_path / "run.toml").write_bytes(to_toml(asked).encode())
    assert load_config(tmp_path / "run.toml") == asked


def test_defaults_and_the_order_of_the_file() -> None:
    lines = to_toml(config_from(LEAST)).splitlines()
    assert lines[:3] == ['model = "digits:resnet18"', 'data = "digits"', "macs = 0.5"]
    assert 'round_to = "auto"' in lines
    assert "lr = 0.01" in lines
    assert not any(line.startswith(("weights", "params", "image_size")) for line in lines)


def test_a_width_in_digits_is_a_number() -> None:
    assert config_from(LEAST | {"round_to": "8"}).round_to == 8


def test_absolute_paths_are_shortened_and_relative_ones_stay() -> None:
    given = LEAST | {"data": "npz:/home/me/photos.npz", "weights": "/home/me/w.pt", "output": "/home/me/run"}
    shown = portable(config_from(given))
    assert (shown.data, shown.weights, shown.output) == ("npz:photos.npz", "w.pt", "run")
    same = config_from(LEAST | {"data": "npz:../photos.npz", "weights": "DEFAULT", "output": "runs/a"})
    assert portable(same) == same
    assert portable(config_from(LEAST)) == config_from(LEAST)
    assert portable(config_from(LEAST | {"data": "imagefolder:/"})).data == "imagefolder:."


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config_from(LEAST).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"macs": 0}, r"macs = 0; allowed: a MACs share, above 0 and at most 1"),
        ({"macs": 1.5}, r"macs = 1\.5; allowed"),
        ({"macs": float("nan")}, r"macs = nan; allowed"),
        ({"macs": "half"}, r"macs = 'half'; allowed"),
        ({"macs": None, "params": -0.1}, r"params = -0\.1; allowed"),
        ({"macs": None, "speedup": 1}, r"speedup = 1; allowed: dense latency / pruned latency, above 1"),
        ({"macs": None}, r"budget: none given; allowed: exactly one of macs, params, speedup"),
        ({"params": 0.5}, r"budget: macs = 0\.5 and params = 0\.5; allowed: exactly one"),
        ({"epochs": -1}, r"epochs = -1; allowed: .*0 only calibrates"),
        ({"parent_epochs": 1.5}, r"parent_epochs = 1\.5"),
        ({"batch": 0}, r"batch = 0"),
        ({"batch": True}, r"batch = True"),
        ({"image_size": 0}, r"image_size = 0"),
        ({"lr": 0}, r"lr = 0"),
        ({"gate": "soft"}, r"gate = 'soft'; allowed: diffprune, diffprune-deterministic or hard-concrete"),
        ({"round_to": 0}, r"round_to = 0"),
        ({"round_to": "often"}, r"round_to = 'often'; allowed: .*or auto"),
        ({"threads": 0}, r"threads = 0"),
        ({"latency_batch": 0}, r"latency_batch = 0"),
        ({"device": "tpu"}, r"device = 'tpu'; allowed: cpu or cuda"),
        ({"seed": -1}, r"seed = -1"),
        ({"output": ""}, r"output = ''"),
        ({"output": "\ud800"}, r"output = '.ud800'; allowed"),
        ({"ouput": "x"}, r"ouput: unknown setting; the nearest known one is output"),
        ({"zzz": 1}, r"zzz: unknown setting; known: model, weights, data"),
    ],
)
def test_each_wrong_setting_is_named_with_its_value(values: dict[str, Any], fact: str) -> None:
    with pytest.raises(BadConfig, match=fact):
        config_from(LEAST | values)


def test_one_error_lists_everything_that_is_wrong() -> None:
    with pytest.raises(BadConfig) as caught:
        config_from({"model": "m", "data": "d", "macs": 0.5, "params": 0.5, "epocs": 3, "lr": -1})
    message = str(caught.value)
    assert message.startswith("4 settings are wrong:")
    unknown = "epocs: unknown setting; the nearest known one is epochs"
    for part in ("output: missing", unknown, "lr = -1", "budget: macs"):
        assert part in message


def test_a_config_made_by_hand_needs_one_budget_too() -> None:
    with pytest.raises(ValueError, match="exactly one of macs, params, speedup"):
        Config(model="m", data="d", output="o")


def test_damaged_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "a"\ndata = \n')
    with pytest.raises(BadConfig, match=r"not valid TOML: .*line 2"):
        load_config(path)


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config_from(LEAST)) + "thread = 2\n")
    with pytest.raises(BadConfig, match=r"thread: unknown setting; the nearest known one is threads\n  at .*run\.toml"):
        load_config(path)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfig, match="not valid TOML"):
        load_config(tmp_path / "run.toml")
    with pytest.raises(BadConfig, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")


def test_settings_come_without_torch() -> None:
    # A bare package in the place of diffprune shows what the modules themselves import.
    code = (
        "import sys, types\n"
        "sys.modules['diffprune'] = package = types.ModuleType('diffprune')\n"
        f"package.__path__ = [{str(Path(config.__file__).parent)!r}]\n"
        "import diffprune.config, diffprune.runfolder\n"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
