"""The machine a number was measured on, without host names and paths."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch

# What decides the block size of convolutions and how int8 is summed, by the names used here and in /proc/cpuinfo of
# x86 and ARM.
ISA_NAMES = {
    "avx2": ("avx2",),
    "avx_vnni": ("avx_vnni",),
    "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni",),
    "amx": ("amx_tile",),
    "neon": ("neon", "asimd"),
}


@dataclass(frozen=True)
class Machine:
    """`cores` are those this process may use: a fraction under a quota. The loads are one-minute averages, if known."""

    cpu: str
    isa: tuple[str, ...]
    cores: float
    os: str
    python: str
    torch: str
    onnxruntime: str
    gpu: str | None = None
    load_before: float | None = None
    load_after: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "isa": list(self.isa)}

    def __str__(self) -> str:
        chips = f"{self.cpu}, {self.cores:g} cores" + (f", {self.gpu}" if self.gpu else "")
        return f"{chips}, onnxruntime {self.onnxruntime}, torch {self.torch}"


def this_machine() -> Machine:
    """The machine as it is now; `load_before` is filled in, `load_after` is for whoever measures in between."""
    fields = _cpuinfo(Path("/proc/cpuinfo"))
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        isa=instruction_sets(fields),
        cores=usable_cores(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        onnxruntime=onnxruntime.__version__,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        load_before=load_average(),
    )


def instruction_sets(cpuinfo: dict[str, str] | None = None) -> tuple[str, ...]:
    """The instruction sets of ISA_NAMES this CPU has. Without /proc/cpuinfo: what torch and the architecture tell."""
    fields = _cpuinfo(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    if flags:
        return tuple(name for name, spellings in ISA_NAMES.items() if flags & set(spellings))
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return ("neon",)
    level = torch.backends.cpu.get_cpu_capability()
    return {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512f")}.get(level, ())


def cpu_kind() -> tuple[str, ...]:
    """What tells CPUs apart that go by one name: family, model and stepping on x86, part and variant on ARM."""
    fields = _cpuinfo(Path("/proc/cpuinfo"))
    keys = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    return tuple(fields.get(key, "") for key in keys)


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """The cores this process may use: its affinity, limited by the CPU quota of its control groups (v2 and v1)."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for line in _lines(membership):
        _, controllers, group = line.split(":", 2)
        root = cgroups / controllers if controllers else cgroups
        for folder in _with_parents(root, group.lstrip("/")):
            cores = min(cores, _quota(folder))
    return cores


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _with_parents(root: Path, group: str) -> list[Path]:
    """A group's folder and those above it: a quota anywhere on the way holds."""
    folder = root / group
    return [root, *(part for part in (folder, *folder.parents) if root in part.parents)]


def _quota(folder: Path) -> float:
    """The cores a control group may use; infinite without a limit."""
    second = " ".join(_lines(folder / "cpu.max"))  # v2: "max 100000" or "150000 100000"
    first = " ".join(_lines(folder / "cpu.cfs_quota_us") + _lines(folder / "cpu.cfs_period_us"))  # v1: "-1" is no limit
    for text in (second, first):
        words = text.split()
        if len(words) == 2 and words[0] not in {"max", "-1"}:
            return float(words[0]) / float(words[1])
    return float("inf")


def _cpuinfo(path: Path) -> dict[str, str]:
    """The fields of the first processor."""
    pairs = (line.partition(":") for line in reversed(_lines(path)))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
