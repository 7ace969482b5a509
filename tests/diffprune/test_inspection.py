"""What `inspect` says of a network."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from newcomer import MODULE, typed, working_in

from diffprune.budget import Budget
from diffprune.models import load_model
from export import Settings


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_in(tmp_path_factory.mktemp("inspect")) as folder:
        yield folder


def inspected(*words: object, model: str = f"{MODULE}:factory", size: str = "1,8,8") -> str:
    outcome = typed("inspect", model, "--input", size, *words)
    assert outcome.code == 0, outcome.err
    assert ("measuring single layers: step 3 of 3" in outcome.err) if "--speedup" in words else outcome.err == ""
    return outcome.out


def test_groups_pins_and_size_are_shown() -> None:
    text = inspected("--round-to", 1)
    params = sum(p.numel() for p in load_model(f"{MODULE}:factory").parameters())
    assert f"{MODULE}:factory: {params // 1000}\N{NARROW NO-BREAK SPACE}{params % 1000:03} parameters" in text
    assert re.search(r"^0 +filter +16 +\d+\.\d % +\d+\.\d %$", text, re.MULTILINE)
    assert re.search(r"^input +1 +model input", text, re.MULTILINE)
    assert re.search(r"^8 +10 +model output", text, re.MULTILINE)


def test_the_share_of_a_group_is_what_goes_with_it() -> None:
    text = inspected("--round-to", 1)
    # The second convolution reads 16 channels at 4 x 4 pixels, 9 weights each; the head reads one value a channel.
    first, second, head = 16 * 9 * 16, 16 * 16 * 9 * 16, 16 * 10
    for name, gone in (("0", first + second), ("3", second + head)):
        share = f"{100 * gone / (first + second + head):.1f} %"
        assert re.search(rf"^{name} +filter +16 +{re.escape(share)}", text, re.MULTILINE), share


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_out_of_reach_is_said_and_is_no_error(kind: str) -> None:
    assert "0.001 is out of reach" in inspected("--round-to", 1, f"--{kind}", 0.001)
    assert "0.5 is within reach" in inspected("--round-to", 1, f"--{kind}", 0.5)


def test_what_is_shown_as_reachable_can_be_asked_for() -> None:
    found = re.search(r"macs: (\S+) of the dense network", inspected("--round-to", 4))
    assert found is not None
    assert f"{found[1].rstrip('0')} is within reach" in inspected("--round-to", 4, "--macs", found[1])
    below = f"{float(found[1]) - 0.001:.3f}"
    assert f"{below.rstrip('0')} is out of reach" in inspected("--round-to", 4, "--macs", below)


def test_a_speed_up_is_measured_before_it_is_called_reachable(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    monkeypatch.setattr("diffprune.stopwatch.SECONDS", 0.3)
    text = inspected("--round-to", 8, "--speedup", 1000)
    found = re.search(r"speed-up: (\S+)x was measured here, interval (\S+) to (\S+), .*; 1000 is out of reach", text)
    assert found is not None, text
    middle, low, high = map(float, found.groups())
    assert low <= middle <= high
    assert re.search(r"^group +kind +units +MACs +parameters +time", text, re.MULTILINE)
    shares = re.findall(r"^[03] +filter +16 +\S+ % +\S+ % +(\d+\.\d) %$", text, re.MULTILINE)
    assert len(shares) == 2
    assert all(0 < float(share) < 100 for share in shares)
    assert "time" not in inspected("--round-to", 8)


def test_a_gpu_is_probed_and_measured_in_torch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's eager mode on the CPU in its place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "torch"))
    monkeypatch.setattr("diffprune.stopwatch.SECONDS", 0.3)
    monkeypatch.setattr(
        "diffprune.target.target", lambda device, **how: Settings(runtime="eager") if device == "cuda" else None
    )
    monkeypatch.setattr("diffprune.target.probe", lambda asked_of: SimpleNamespace(multiple=4))
    monkeypatch.setattr("export.compare", None)
    text = inspected("--speedup", 1000, "--latency-device", "cuda", "--latency-precision", "fp16")
    assert re.search(r"x was measured here, .*in steps of 4; 1000 is out of reach", text), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu() -> None:
    outcome = typed("inspect", f"{MODULE}:factory", "--input", "1,8,8", "--speedup", 2, "--latency-device", "cuda")
    assert outcome.code == 2
    assert "DeviceMissing: " in outcome.err


def test_the_alignment_is_part_of_the_answer() -> None:
    text = inspected("--round-to", 16)
    assert re.search(r"macs: 1.000 of the dense .* multiples of 16, and 0\.\d+ with any widths", text)


def test_a_network_where_nothing_can_be_cut_is_said_and_is_no_error() -> None:
    text = inspected("--macs", 0.5, model=f"{MODULE}:rigid")
    assert "nothing can be cut" in text
    assert "model output" in text


def test_long_names_fit_a_terminal() -> None:
    text = inspected(model="torchvision:squeezenet1_1", size="3,64,64")
    assert max(len(line) for line in text.split("\n\n")[1].splitlines()) <= 80
    assert "features.12.expand1x1" in text


def test_the_demo_network_needs_no_size() -> None:
    outcome = typed("inspect", "digits:resnet18")
    assert outcome.code == 0, outcome.err
    assert "per image of (1, 16, 16)" in outcome.out


def test_classes_reach_the_network() -> None:
    assert re.search(r"^8 +7 +model output", inspected("--classes", 7), re.MULTILINE)


def test_the_words_of_budget_and_inspect_agree() -> None:
    """Both call the kinds by the names of the options."""
    text = inspected()
    for budget in (Budget(macs=1.0), Budget(params=1.0)):
        assert f"\n{budget.kind}: " in text
