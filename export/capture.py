"""From a torch network to an ONNX graph in memory, quietly."""

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass
from torch import Tensor, nn

from export.attention import FourAxes
from export.dropping import drop_closed
from export.errors import NotExportable
from export.folding import fold_scales
from export.naming import name_transposed_
from export.operators import operators_once

CHATTY = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and log lines from the exporter, critical ones excepted: what matters is checked afterwards."""
    before = {name: logging.getLogger(name).level for name in CHATTY}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in CHATTY:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def capture(
    resting: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    """The network as an ONNX model whose axis 0 is called "batch", with nothing in it but the computation.

    BatchNorm is folded into the convolutions by the exporter, constant factors behind a convolution by us. The
    exporter writes every node's stack trace, absolute source paths included, into its metadata: all of it is removed.

    Raises:
        NotExportable: the exporter does not manage, or a closed gate is still there.
    """
    try:
        with quiet(), torch.random.fork_rng(devices=[]), FourAxes(), operators_once():
            program = torch.onnx.export(
                resting,
                inputs,
                None,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=_free_batch(resting, inputs),
            )
            assert program is not None  # the dynamo exporter always returns one
            if fold_scales(program.model):
                program.optimize()  # a BatchNorm behind a folded factor now sits directly behind its convolution
    except NotExportable:
        raise
    except Exception as error:
        raise NotExportable(
            f"torch cannot export this network: {_first_line(error)}",
            at=type(resting).__name__, effect="nothing was written; the model is unchanged",
            fix="make forward() traceable by torch.export with a free batch size; the chained error names the line",
        ) from error
    model = program.model
    drop_closed(model)
    tidy_(model)
    name_transposed_(model, resting)
    model.metadata_props.clear()
    model.doc_string = None
    return model


def _free_batch(resting: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The batch of every input is free; what goes into `*args` is one tuple to torch.export."""
    given = inspect.signature(resting.forward).bind(*inputs).arguments.values()
    batch = {0: "batch"}
    return tuple(tuple(batch for _ in value) if isinstance(value, tuple) else batch for value in given)


@quiet()
def tidy_(model: ir.Model) -> None:
    """Nothing but the computation: no unused nodes, no weight twice, nothing that tools wrote about the parts."""
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass()(model)
    for graph in model.graphs():
        values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
        for part in (graph, *graph, *values):
            part.metadata_props.clear()
            part.doc_string = None


def _first_line(error: BaseException) -> str:
    """The innermost cause in one line; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
