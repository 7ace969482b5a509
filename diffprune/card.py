"""What the network is, what was measured, what it cannot do: MODEL_CARD.md of a run, and the card of an export."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template

from diffprune.pruned import STATIC, Origin
from diffprune.quantized import COLUMNS, quantized_rows, sentences
from diffprune.report import rows, size, templates, tiny, warnings, words
from export import OnnxFile, this_machine

MOST_LABELS = 20
"""More are only in the metadata of the files."""


def model_card(report: Mapping[str, Any], origin: Origin) -> str:
    """Markdown with the front matter that model hubs read. Every text in it is on one line and cannot break out."""
    return _template("model_card.md").render(
        **_usage(origin, "pruned.onnx", baked=False),
        title=f"{report['model']} on {report['data']}, pruned",
        report=report,
        rows=rows(report),
        machine=report["machine"],
        speed=report["latency"]["cpu"],
        files={name: _takes(name, baked="uint8" in name) for name in report["file_bytes"]},
        warnings=warnings(report),
    )


def export_card(files: Sequence[OnnxFile], origin: Origin, saved: str, manifest: str, *, baked: bool) -> str:
    """The same for files that were written from the network in `saved`, of which nothing was measured."""
    return _template("export_card.md").render(
        **_usage(origin, files[0].path.name, baked=baked),
        files=[(file, _takes(file.path.stem, baked=baked)) for file in files],
        saved=saved,
        manifest=manifest,
    )


def quantized_card(report: Mapping[str, Any], origin: Origin) -> str:
    """The same for the file that `quantize_run` reports on."""
    return _template("quantized_card.md").render(
        **_usage(origin, report["file"], baked=False), report=report, head=COLUMNS, rows=quantized_rows(report),
        sentences=sentences(report), machine=this_machine(),
    )  # fmt: skip


def _template(name: str) -> Template:
    environment = templates(escape=False)  # Markdown: `line`, `code` and `yaml` do what is needed
    environment.filters |= {"line": line, "code": code, "yaml": json.dumps, "tiny": tiny, "size": size, "words": words}
    return environment.get_template(name)


def _usage(origin: Origin, main: str, *, baked: bool) -> dict[str, Any]:
    """What usage.md asks for. `main` is the file that its code reads, `baked` if that takes pixels."""
    channels, height, width = json.loads(origin.metadata["input_shape"])
    labels = origin.labels or ()
    return {
        "about": origin.metadata,
        "main": main,
        "baked": baked,
        "labels": labels if len(labels) <= MOST_LABELS else (),
        "shape": {"nchw": (1, channels, height, width), "nhwc": (1, height, width, channels)},
        "normalised": origin.normalised,
    }


def _takes(name: str, *, baked: bool) -> str:
    """What a file of this stem takes, in words."""
    pixels = "uint8 (batch, height, width, channels), normalised inside"
    images = "float32 (batch, channels, height, width), normalised"
    batch = "; batch 1 only, every axis fixed" if name.endswith(STATIC) else ""
    return f"{pixels if baked else images}{batch}"


def line(text: str) -> str:
    """Text as text: on one line, with the signs of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text between backticks, more of them than it holds itself."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{' '.join(text.split())}{padding}{fence}"
