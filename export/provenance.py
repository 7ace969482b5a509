"""What a file says about itself: strings in the metadata of the ONNX model."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata as distributions

import torch

from export.errors import NotExportable

TOOL = "diffprune"


def tool_version() -> str:
    """The installed version of the tool, "unknown" when it runs from sources that were never installed."""
    try:
        return distributions.version(TOOL)
    except distributions.PackageNotFoundError:
        return "unknown"


def parity_passed(tolerance: float, batches: Sequence[int]) -> str:
    """The gate as text: the bound, not the number measured, which differs in its last digits between CPUs."""
    return f"max |onnxruntime - torch| / max |torch| <= {tolerance:g} at batch {', '.join(map(str, batches))}"


def provenance(
    metadata: Mapping[str, str] | None,
    labels: Sequence[str] | None,
    *,
    tolerance: float,
    batches: Sequence[int],
    baked: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Key and value pairs for `metadata_props`, sorted: tool, versions, the parity that was passed, the caller's own.

    There is no date: the same network gives the same bytes. `baked` is what preprocessing inside the file says.

    Raises:
        NotExportable: a key that is ours with another value, or something that is not a string.
    """
    ours = {
        "tool": TOOL,
        "tool_version": tool_version(),
        "torch_version": torch.__version__,
        "parity": parity_passed(tolerance, batches),
        **(baked or {}),
    }
    if labels is not None:
        ours["labels"] = json.dumps(list(labels), ensure_ascii=False)
    given = dict(metadata or {})
    for key, value in given.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise NotExportable(
                f"metadata {key!r}: {value!r} is not a pair of strings", at="metadata", effect="nothing was written",
                fix="ONNX metadata are strings: use str() or json.dumps()",
            )
        if ours.get(key, value) != value or key == "labels":
            raise NotExportable(
                f"metadata key {key!r} is written by the export itself", at="metadata", effect="nothing was written",
                fix="use another key; class names go into labels=",
            )
    found = dict(sorted((ours | given).items()))
    for pair in found.items():
        try:
            "".join(pair).encode()
        except UnicodeEncodeError as error:
            raise NotExportable(
                f"metadata {pair} is not UTF-8", at="metadata or labels", effect="nothing was written",
                fix="use strings that can be encoded: half of a surrogate pair often stands for a byte of a file name",
            ) from error
    return found
