"""What is said about the machine, read from files that a test can write."""

import getpass
import json
import os
import platform
import socket
from dataclasses import replace

import pytest

import export
from export import machine


def test_this_machine_is_described_without_names_and_paths():
    here = export.this_machine()
    text = json.dumps(here.as_dict(), allow_nan=False)
    assert here.cpu
    assert 0 < here.cores <= (os.cpu_count() or 1)
    assert os.sep + "home" not in text
    for private in (socket.gethostname(), getpass.getuser()):
        assert len(private) < 5 or private not in text
    assert replace(here, load_after=1.0).as_dict()["load_after"] == 1.0


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ({"flags": "sse avx2 avx512f avx512_vnni amx_tile"}, ("avx2", "avx512f", "avx512_vnni", "amx")),
        ({"flags": "sse avx avx2"}, ("avx2",)),
        ({"Features": "fp asimd crc32"}, ("neon",)),
    ],
)
def test_instruction_sets_are_read_from_x86_and_arm(cpuinfo, found):
    assert machine.instruction_sets(cpuinfo) == found


def test_without_cpuinfo_the_architecture_and_torch_tell(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert machine.instruction_sets({}) == ("neon",)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(machine.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert machine.instruction_sets({}) == ("avx2", "avx512f")
    monkeypatch.setattr(machine.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert machine.instruction_sets({}) == ()


@pytest.mark.parametrize(
    ("files", "membership", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 0.5),
        ({"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 0.5),
        ({"cpu/a/cpu.cfs_quota_us": "25000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, "1:cpu:/a\n0::/\n", 0.25),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/\n", None),
    ],
)
def test_a_quota_on_the_way_up_limits_the_cores(tmp_path, files, membership, cores):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "membership").write_text(membership)
    unlimited = machine.usable_cores(tmp_path, tmp_path / "nothing")
    assert machine.usable_cores(tmp_path, tmp_path / "membership") == (unlimited if cores is None else cores)
