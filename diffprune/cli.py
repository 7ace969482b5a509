"""The command line. torch is imported only by the commands that need it, so that help comes at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Learn which channels a trained network needs, cut the others out exactly, measure the speed-up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[str, typer.Argument(help="torchvision:NAME, digits:resnet18 or package.module:factory")]
InputOption = Annotated[str, typer.Option("--input", help="channels,height,width of one image")]


@app.command()
def demo(
    output: Annotated[str | None, typer.Option(help="folder of the run  [runs/demo, runs/demo-2, ...]")] = None,
) -> None:
    """Compress a small ResNet-18 on scikit-learn's digits: train, search, cut, recover, export, measure."""
    from diffprune.demo import demo_config
    from diffprune.runfolder import next_free

    _run(demo_config(output or str(next_free(Path("runs/demo")))))


@app.command()
def compress(
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings below")] = None,
    model: Annotated[
        str | None, typer.Option(help="torchvision:NAME, digits:resnet18 or package.module:factory")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="DEFAULT, a .safetensors or a .pt file")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, cifar10:PATH, mnist:PATH, imagefolder:PATH, npz:PATH or package.module:function"),
    ] = None,
    macs: Annotated[float | None, typer.Option(help="budget: share of the dense MACs that may remain")] = None,
    params: Annotated[float | None, typer.Option(help="budget: share of the dense parameters that may remain")] = None,
    epochs: Annotated[float | None, typer.Option(help="search and recovery together  [5]")] = None,
    parent_epochs: Annotated[int | None, typer.Option(help="train the dense network first  [0]")] = None,
    batch: Annotated[int | None, typer.Option(help="images in a batch  [128]")] = None,
    image_size: Annotated[int | None, typer.Option(help="pixels")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate  [0.02]")] = None,
    gate: Annotated[str | None, typer.Option(help="diffprune, diffprune-deterministic or hard-concrete")] = None,
    round_to: Annotated[str | None, typer.Option(help="widths stay multiples of this; auto probes  [auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads to measure latency with  [1]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, to train on  [cpu]")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything random  [0]")] = None,
    output: Annotated[str | None, typer.Option(help="folder of the run; must not exist")] = None,
) -> None:
    """Compress a trained network to a budget and ship it as ONNX. Options go before the TOML file's settings."""
    options = {k: v for k, v in locals().items() if v is not None and k != "config"}
    from diffprune.config import config_from, load_values

    values = load_values(config) if config else {}
    if {"macs", "params"} & options.keys():
        values = {k: v for k, v in values.items() if k not in ("macs", "params", "speedup")}
    _run(config_from({**values, **options}, source=str(config) if config else "the command line"))


@app.command()
def inspect(
    model: ModelArgument,
    weights: Annotated[str | None, typer.Option(help="DEFAULT, a .safetensors or a .pt file")] = None,
    input_: InputOption = "3,224,224",
    macs: Annotated[float | None, typer.Option(help="is this budget reachable?")] = None,
    params: Annotated[float | None, typer.Option(help="is this budget reachable?")] = None,
    round_to: Annotated[int, typer.Option(help="widths stay multiples of this")] = 1,
) -> None:
    """Show, before any training, what can be cut, what is pinned and why, and how far a budget can go."""
    from diffprune.inspection import inspection

    _print(*inspection(model, weights, _shape(input_), macs=macs, params=params, round_to=round_to))


@app.command()
def bench(
    dense: Annotated[Path, typer.Argument(help="an ONNX file")],
    small: Annotated[Path | None, typer.Argument(help="another one, to compare with")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; spinning is off when more than 1")] = 1,
    batch: Annotated[int, typer.Option(help="images at once")] = 1,
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 10.0,
    json: Annotated[Path | None, typer.Option(help="write every sample to this file")] = None,
) -> None:
    """Measure one ONNX file, or compare two in random interleaved runs."""
    import export

    settings: dict[str, Any] = {"device": device, "threads": threads, "batch": batch, "seconds": seconds}
    result = export.compare(dense, small, **settings) if small else export.measure(dense, **settings)
    _print(str(result), *(f"warning: {text}" for text in result.warnings))
    if json:
        from diffprune.runfolder import as_json, write_atomically

        write_atomically(json, as_json(result.as_dict()))


@app.command()
def export(
    saved: Annotated[Path, typer.Argument(help="pruned.safetensors of a run")],
    model: Annotated[str, typer.Option(help="the dense network it was cut from, as for compress")],
    output: Annotated[Path, typer.Option(help="the ONNX file to write")],
    input_: InputOption = "3,224,224",
    classes: Annotated[int | None, typer.Option(help="classes that the dense network was built with")] = None,
    opset: Annotated[int, typer.Option(help="18 or later")] = 18,
) -> None:
    """Turn a saved network into an ONNX file, checked against the network."""
    import torch

    import surgery
    from diffprune.models import load_model
    from export import to_onnx

    small = surgery.load(saved, lambda: load_model(model, num_classes=classes))
    example = torch.randn(2, *_shape(input_), generator=torch.Generator().manual_seed(0))
    file = to_onnx(small, example, output, opset=opset, metadata={"source_model": model})
    _print(f"{file.path}: {file.size / 1e6:.2f} MB, opset {file.opset}, parity {file.parity.worst:.1e}, {file.sha256}")


def main() -> None:
    """Exit codes: 0 done, 2 refused with what, where, effect and fix, 130 interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted; no run folder was finished", 130)
    except Exception as error:
        if not _is_ours(error):
            raise
        _fail(f"{type(error).__name__}: {error}", 2)


def _is_ours(error: Exception) -> bool:
    """One of the three packages' own errors. By name, as importing them all would mean importing torch."""
    return any(base.__name__ in ("DiffpruneError", "SurgeryError", "ExportError") for base in type(error).__mro__)


def _fail(text: str, code: int) -> None:
    typer.echo(text, err=True)
    sys.exit(code)


def _shape(text: str) -> tuple[int, ...]:
    from diffprune.errors import BadConfig

    try:
        shape = tuple(int(part) for part in text.split(","))
        if not shape or min(shape) < 1:
            raise ValueError("sizes are 1 or more")
    except ValueError as error:
        raise BadConfig(
            f"--input is {text!r}: {error}",
            at="the command line",
            effect="nothing was started",
            fix="write it as 3,224,224",
        ) from error
    return shape


def _print(*lines: Any) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line)


def _run(config: Any) -> None:
    from diffprune.progress import Progress
    from diffprune.report import summary_table
    from diffprune.run import run

    with Progress() as progress:
        finished = run(config, on_event=progress)
    _print(
        "",
        summary_table(finished.report),
        finished.report["verdict"],
        *(f"warning: {text}" for text in finished.report["warnings"] + finished.report["latency"]["cpu"]["warnings"]),
        f"everything is in {finished.folder}; open {finished.folder / 'report.html'}",
    )
