"""The numbers of a network in int8 or float16 for people: warnings, and a table for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffprune.report import milliseconds, percent, size, times
from diffprune.tables import add_row, table
from diffprune.verdict import speed_in_words
from export.recipes import has_vnni

PRECISIONS = ("int8", "fp16")

COLUMNS = ("", "size", "accuracy", "agreement", "SQNR", "latency", "speed-up")

KEPT = 0.99
"""Below this share of the pruned network's accuracy a warning says so; MLPerf demands it of quantized networks."""


def warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know before the numbers are believed or the file is shipped."""
    accuracy, precision, target = report["accuracy"], report["recipe"]["precision"], report["recipe"].get("target")
    if accuracy[precision] < KEPT * accuracy["pruned"]:
        yield (
            f"{precision} loses accuracy: it answers {percent(accuracy[precision])} of the held-out images right, "
            f"pruned.onnx {percent(accuracy['pruned'])}; do not ship it unless that is enough"
        )
    if target == "x86-vnni" and not has_vnni():
        yield "made for CPUs with VNNI, which this one lacks: sums saturate here, so accuracy and speed differ"
    if target == "tensorrt":
        yield "made for TensorRT: what is measured here is onnxruntime on the CPU"
    if precision == "fp16":
        yield "float16 is for GPUs: onnxruntime computes it in float32 on the CPU, which is what is measured here"
    for found in report["latency"].values():
        yield from found["warnings"]


def quantized_lines(report: Mapping[str, Any]) -> Iterator[Any]:
    """A table and sentences for a terminal."""
    drawn = table(*COLUMNS, right=range(1, 7))
    for row in quantized_rows(report):
        add_row(drawn, *row)
    yield drawn
    yield ""
    yield from sentences(report)
    yield from (f"warning: {text}" for text in dict.fromkeys(report["warnings"]))


def quantized_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """COLUMNS of the dense, the pruned and the smaller network."""
    precision, latency = report["recipe"]["precision"], report["latency"]
    for key in ("dense", "pruned", precision):
        against = latency[f"dense_{'pruned' if key == 'dense' else key}"]
        mine = against["dense" if key == "dense" else "small"]["median"]
        smaller = key == precision
        yield (
            key,
            size(report["file_bytes"][key]),
            percent(report["accuracy"][key]),
            percent(report["fidelity"]["top1_agreement"]) if smaller else "",
            f"{report['fidelity']['sqnr_db']:.1f} dB" if smaller else "",
            milliseconds(mine),
            "" if key == "dense" else f"{times(against['speedup'])} [{against['low']:.2f}, {against['high']:.2f}]",
        )


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """How fast it is, and what the numbers were taken on."""
    precision = report["recipe"]["precision"]
    for other in ("dense", "pruned"):
        found = report["latency"][f"{other}_{precision}"]
        speed = speed_in_words(found["speedup"], found["low"], found["high"])
        yield f"{report['file']}, compared with {other}.onnx, is {speed}"
    seen = report["recipe"]["examples"]
    yield (
        f"agreement and SQNR are those with pruned.onnx on {report['accuracy']['examples']} held-out images; "
        f"{seen} training images were {'calibrated on' if precision == 'int8' else 'tried first'}"
    )
