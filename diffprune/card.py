"""MODEL_CARD.md: what the network is, what was measured, what it cannot do."""

import json
import re
from collections.abc import Mapping
from typing import Any

from diffprune.pruned import STATIC, Origin, normalised
from diffprune.report import rows, templates, tiny, warnings, words

MOST_LABELS = 20
"""More are only in the metadata of the files."""


def model_card(report: Mapping[str, Any], origin: Origin) -> str:
    """Markdown with the front matter that model hubs read. Every text in it is on one line and cannot break out."""
    environment = templates(escape=False)  # Markdown: `line`, `code` and `yaml` do what is needed
    environment.filters |= {"line": line, "code": code, "yaml": json.dumps, "tiny": tiny, "words": words}
    channels, height, width = json.loads(origin.metadata["input_shape"])
    labels = origin.labels or ()
    return environment.get_template("model_card.md").render(
        title=f"{report['model']} on {report['data']}, pruned",
        about=origin.metadata,
        report=report,
        rows=rows(report),
        machine=report["machine"],
        speed=report["latency"]["cpu"],
        files={name: _takes(name) for name in report["file_bytes"]},
        labels=labels if len(labels) <= MOST_LABELS else (),
        shape={"nchw": (1, channels, height, width), "nhwc": (1, height, width, channels)},
        normalised=normalised(origin.preprocessing.mean, origin.preprocessing.std),
        warnings=warnings(report),
    )


def _takes(name: str) -> str:
    """What a file of this stem takes, in words."""
    pixels = "uint8 (batch, height, width, channels), normalised inside"
    images = "float32 (batch, channels, height, width), normalised"
    batch = "; batch 1 only, every axis fixed" if name.endswith(STATIC) else ""
    return f"{pixels if 'uint8' in name else images}{batch}"


def line(text: str) -> str:
    """Text as text: on one line, with the signs of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text between backticks, more of them than it holds itself."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{' '.join(text.split())}{padding}{fence}"
