"""Handing out a smaller file: cleaned, held to the laws, compared with the float32 file, put in place as a whole."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, TopologicalSortPass

from export.calibration import Source, refused
from export.distance import Array
from export.drafts import hidden, sha256_of
from export.errors import ParityFailed
from export.outputs import Fidelity, answers, fidelity
from export.rules import check_portable
from export.sessions import data_files, read_model


@dataclass(frozen=True)
class Quantized:
    """A smaller file that was written and checked, `size` in bytes; how it was made, as its metadata tell.

    `fidelity` compares it with the float32 file on the examples it was made with, as this CPU computes both.
    """

    path: Path
    sha256: str
    size: int
    recipe: Mapping[str, Any]
    fidelity: Fidelity

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the file by its name, without its folder."""
        return {"file": self.path.name, "sha256": self.sha256, "size": self.size, "recipe": dict(self.recipe),
                "fidelity": asdict(self.fidelity)}


def finished(
    small: onnx.ModelProto,
    source: Source,
    place: Path,
    batches: Sequence[Array],
    about: dict[str, Any],
    *,
    tolerance: float = np.inf,
) -> Quantized:
    """Clean the converted model, hold it to the laws, compare it with its source, and put it in its place."""
    recipe = {**about, "examples": sum(map(len, batches)), "onnxruntime": onnxruntime.__version__}
    graph = _cleaned(small, source, recipe)
    with hidden(place) as folder:
        draft = folder / place.name
        ir.save(graph, draft, format="protobuf")
        written = check_portable(draft, opset=source.opset, ir_version=source.model.ir_version)
        _check_interface(written, source)
        found = fidelity(answers(draft, batches), answers(source.path, batches))
        if not (found.relative <= tolerance):  # written so that a NaN is refused as well
            raise ParityFailed(
                f"the file is wrong by {found.relative:.3g} of the largest output; allowed is {tolerance:g}",
                at=f"{place.name}: top-1 agreement {found.top1_agreement:.0%}, SQNR {found.sqnr_db:.1f} dB",
                effect="nothing was written; an older file is untouched", fix="keep float32, or try another precision",
            )
        made = Quantized(place, sha256_of(draft), draft.stat().st_size, recipe, found)
        os.replace(draft, place)
    return made


def _cleaned(small: onnx.ModelProto, source: Source, recipe: Mapping[str, Any]) -> ir.Model:
    """In the order of computation, without what the tools wrote about themselves, with the source's own metadata."""
    graph = ir.from_proto(small)
    for tidy in (ClearMetadataAndDocStringPass(), TopologicalSortPass()):
        tidy(graph)
    properties = {entry.key: entry.value for entry in source.model.metadata_props}
    if "parity" in properties:  # what was promised of the float32 file
        properties["float32_parity"] = properties.pop("parity")
    data = [source.path.parent / name for name in data_files(read_model(source.path))]
    properties |= {"quantization": json.dumps(recipe), "float32_sha256": sha256_of(source.path, *data)}
    graph.metadata_props.clear()
    graph.metadata_props.update(sorted(properties.items()))
    graph.ir_version, graph.doc_string = source.model.ir_version, None
    graph.producer_name, graph.producer_version = source.model.producer_name, source.model.producer_version
    return graph


def _check_interface(written: onnx.ModelProto, source: Source) -> None:
    for kind in ("input", "output"):
        made, given = getattr(written.graph, kind), getattr(source.model.graph, kind)
        if len(made) != len(given) or not all(map(_same, made, given)):
            raise refused(
                f"the {kind}s came out as {list(made)}, not {list(given)}", source.path, "please report this network"
            )


def _same(made: onnx.ValueInfoProto, given: onnx.ValueInfoProto) -> bool:
    """By name and type; by shape where `given` has one, which not every exporter writes."""
    types = made.type.tensor_type, given.type.tensor_type
    shape = not types[1].HasField("shape") or types[0].shape == types[1].shape
    return made.name == given.name and types[0].elem_type == types[1].elem_type and shape
