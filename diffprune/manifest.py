"""manifest.json: every file of a run with its sha256, and what it was made with.

It finds what was damaged or mixed up, by accident or by hand. It is no signature: who can write the folder can write
another manifest as well.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from diffprune import __version__
from diffprune.config import Config, config_from, portable
from diffprune.errors import BadRun
from diffprune.pruned import Origin
from diffprune.runfolder import as_json, write_atomically
from export.drafts import sha256_of

NAME = "manifest.json"
FORMAT = "diffprune-manifest-1"
MADE_WITH = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "safetensors")


@dataclass(frozen=True)
class Manifest:
    """What verifying a run needs to know; `files` is the sha256 of each by its name."""

    config: Config
    origin: Origin
    versions: Mapping[str, str]
    files: Mapping[str, str]


def versions() -> dict[str, str]:
    """Of this package, Python, and all packages that decide what is in the files."""
    others = {name: str(import_module(name).__version__) for name in MADE_WITH}
    return {"diffprune": __version__, "python": platform.python_version(), **others}


def write_manifest(folder: Path, config: Config, origin: Origin) -> Path:
    """List everything in `folder`."""
    body = {
        "format": FORMAT,
        "seed": config.seed,
        "config": portable(config).model_dump(exclude_none=True),
        "origin": asdict(origin),
    }
    return write_listing(folder / NAME, body, [path for path in sorted(folder.iterdir()) if path.name != NAME])


def write_listing(target: Path, body: Mapping[str, Any], files: Iterable[Path]) -> Path:
    """`body` with the date, the versions and all `files`; a seal at the end, so that no byte changes unnoticed."""
    made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    return write_atomically(target, _sealed({**body, **made, "files": {path.name: _listed(path) for path in files}}))


def list_too(folder: Path, names: Iterable[str]) -> Path:
    """Add files that came into `folder` later, or changed; all others stay listed as they were. Raises BadRun."""
    body = _body(folder)
    body["files"] |= {name: _listed(folder / name) for name in names}
    return write_atomically(folder / NAME, _sealed(body))


def _listed(path: Path) -> dict[str, str | int]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def read_manifest(folder: Path) -> Manifest:
    """Raises BadRun: no such run, or a manifest that is damaged or of another format."""
    body = _body(folder)
    try:
        files = {name: str(entry["sha256"]) for name, entry in body["files"].items()}
        return Manifest(config_from(body["config"]), Origin(**body["origin"]), body["versions"], files)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error


def _body(folder: Path) -> dict[str, Any]:
    """What the seal holds together. Raises BadRun."""
    try:
        text = (folder / NAME).read_bytes().decode()
        body: dict[str, Any] = json.loads(text)
        seal = body.pop("sha256")
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']!r}, known is {FORMAT!r}")
        if text != _sealed(body):
            raise ValueError(f"it was changed after it was written, its own sha256 is not {seal!r}")
        if strange := [name for name in body["files"] if Path(name).name != name]:
            raise ValueError(f"{strange[0]!r} is not a file of this folder")
        return body
    except OSError as error:
        raise _bad(folder, f"{NAME} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error


def _sealed(body: Mapping[str, Any]) -> str:
    return as_json({**body, "sha256": hashlib.sha256(as_json(body).encode()).hexdigest()})


def _damaged(folder: Path, error: Exception) -> BadRun:
    return _bad(folder, f"{NAME} is damaged: {error}")


def _bad(folder: Path, fact: str) -> BadRun:
    return BadRun(
        fact,
        at=str(folder),
        effect="the run was not read",
        fix="give the folder of a finished run, as diffprune compress left it; copy it again if it is damaged",
    )
