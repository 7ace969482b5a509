"""The command line. torch is imported only by the commands that need it, so that help comes at once."""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffprune import __version__
from diffprune.endings import last_words, spelled
from diffprune.interrupts import Interrupts
from diffprune.options import bad_option, counts, image_shape, lines_of, multiple, named_sizes, numbers, require_folder

app = typer.Typer(
    help="Learn which channels a trained network needs, cut the others out exactly, measure the speed-up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

NETWORK = "torchvision:NAME, digits:resnet18 or package.module:factory"
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells know it."""

STOPPED = "interrupted; nothing that looks finished was left"

WEIGHTS = "DEFAULT, a .safetensors or a .pt file  [fresh ones]"
InputOption = Annotated[
    str | None,
    typer.Option("--input", help="channels,height,width of an image  [1,16,16 for digits:NAME, else 3,224,224]"),
]
ClassesOption = Annotated[
    int | None, typer.Option(min=1, help="classes, where they differ from the network's usual ones")
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"diffprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def demo(
    output: Annotated[str | None, typer.Option(help="folder of the run  [runs/demo, runs/demo-2, ...]")] = None,
) -> None:
    """Try it on handwritten digits.

    Trains a small ResNet-18, searches, cuts, recovers, exports and measures it, in a few minutes.
    """
    from diffprune.demo import demo_config
    from diffprune.runfolder import next_free

    _run(demo_config(output or str(next_free(Path("runs/demo")))))


@app.command()
def compress(
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings below")] = None,
    model: Annotated[str | None, typer.Option(help=NETWORK)] = None,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, cifar10:PATH, mnist:PATH, imagefolder:PATH, npz:PATH or package.module:function"),
    ] = None,
    macs: Annotated[float | None, typer.Option(help="budget: share of the dense MACs that may remain")] = None,
    params: Annotated[float | None, typer.Option(help="budget: share of the dense parameters that may remain")] = None,
    speedup: Annotated[
        float | None, typer.Option(help="budget: dense latency / pruned latency, as measured on this machine")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="search and recovery together  [5]")] = None,
    parent_epochs: Annotated[int | None, typer.Option(help="train the dense network first  [0]")] = None,
    parent_lr: Annotated[float | None, typer.Option(help="peak learning rate of that  [0.05]")] = None,
    batch: Annotated[int | None, typer.Option(help="images in a batch  [128]")] = None,
    image_size: Annotated[int | None, typer.Option(help="pixels  [16 for digits, 224 for imagefolder]")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate  [0.01]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bfloat16 to train under autocast  [float32]")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="diffprune, diffprune-deterministic or hard-concrete  [diffprune]")
    ] = None,
    round_to: Annotated[str | None, typer.Option(help="widths stay multiples of this; auto probes  [auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads to measure latency with  [1]")] = None,
    latency_batch: Annotated[int | None, typer.Option(help="images at once when latency is measured  [1]")] = None,
    latency_device: Annotated[
        str | None, typer.Option(help="cpu, or cuda: a speed-up is asked of torch's CUDA graphs on this GPU  [cpu]")
    ] = None,
    latency_precision: Annotated[str | None, typer.Option(help="fp32; on cuda also tf32 and fp16  [fp32]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, to train on  [cpu]")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything random  [0]")] = None,
    license: Annotated[
        str | None, typer.Option(help="of the weights, for the model card and the files  [unknown]")
    ] = None,
    static_twin: Annotated[
        bool | None, typer.Option("--static-twin", help="write pruned ONNX files with a fixed batch of 1 too  [off]")
    ] = None,
    preprocessing: Annotated[
        bool | None,
        typer.Option("--preprocessing", help="write an ONNX file that takes uint8 pixels, (N, H, W, C), too  [off]"),
    ] = None,
    output: Annotated[str | None, typer.Option(help="folder of the run; must be new or empty")] = None,
) -> None:
    """Compress a trained network to a budget.

    Writes a folder with the small network, its ONNX file and a report of what it cost and gained. An option given here
    wins over the same setting in the TOML file.
    """
    options = {key: value for key, value in locals().items() if value is not None and key != "config"}
    from diffprune.config import BUDGETS, config_from, load_values

    values = load_values(config) if config else {}
    if options.keys() & BUDGETS:
        values = {key: value for key, value in values.items() if key not in BUDGETS}
    sources = [str(config)] * bool(config) + ["the command line"] * bool(options or not config)
    _run(config_from({**values, **options}, source=" and ".join(sources)))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=NETWORK)],
    weights: Annotated[str | None, typer.Option(help=WEIGHTS)] = None,
    input_: InputOption = None,
    classes: ClassesOption = None,
    macs: Annotated[float | None, typer.Option(help="can this share of the MACs be reached?")] = None,
    params: Annotated[float | None, typer.Option(help="can this share of the parameters be reached?")] = None,
    speedup: Annotated[float | None, typer.Option(help="can it be so many times faster here? measures it")] = None,
    round_to: Annotated[
        str, typer.Option(help="widths stay multiples of this; auto looks at the instruction set, or probes a GPU")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads to measure with")] = 1,
    batch: Annotated[int, typer.Option(help="images at once when it measures")] = 1,
    latency_device: Annotated[str, typer.Option(help="cpu, or cuda: torch's CUDA graphs on this GPU")] = "cpu",
    latency_precision: Annotated[str, typer.Option(help="fp32; on cuda also tf32 and fp16")] = "fp32",
) -> None:
    """Show what can be cut, before any training.

    Every group with its units and its share of MACs and parameters (and of the time, if a speed-up is asked),
    everything pinned with the reason, and how far a budget can go.
    """
    shape = image_shape(input_, model)
    from diffprune.inspection import inspection
    from diffprune.progress import Progress
    from diffprune.target import probe, target

    asked_of = target(latency_device, threads=threads, batch=batch, precision=latency_precision)
    step = probe(asked_of).multiple if round_to == "auto" and latency_device == "cuda" else multiple(round_to)
    budgets = {"macs": macs, "params": params, "speedup": speedup}
    with Progress() as progress:
        lines = inspection(
            model, weights, shape, classes=classes, **budgets, round_to=step, asked_of=asked_of, tell=progress
        )
    _print(*lines)


@app.command()
def bench(
    dense: Annotated[Path, typer.Argument(help="an ONNX file, or the folder of a run: both of its networks")],
    small: Annotated[Path | None, typer.Argument(help="another ONNX file, to compare with")] = None,
    runtime: Annotated[str, typer.Option(help="onnx; of a run also eager, compile, cuda-graph")] = "onnx",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32; on cuda also tf32; in torch also fp16")] = "fp32",
    threads: Annotated[str, typer.Option(help="CPU threads; onnxruntime's do not spin when more than 1")] = "1",
    batch: Annotated[str, typer.Option(help="inputs at once")] = "1",
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", help="NAME=3,224,224: an input's sizes behind the batch, where the file has them free"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="how long to measure under each setting")] = 10.0,
    json: Annotated[Path | None, typer.Option(help="write every sample to this file")] = None,
) -> None:
    """Measure an ONNX file, or compare two.

    Two networks are run in random interleaved rounds; the ratio of their medians comes with a 95 % interval. runtime,
    precision, threads and batch take lists, such as --batch 1,8: every combination is measured. Inputs are random.
    """
    if json:
        require_folder(json, "--json")
        if json.suffix.lower() == ".onnx":
            raise bad_option(f"--json is {str(json)!r}, which would be replaced", "name a file that ends in .json")
    shapes = dict(named_sizes(text) for text in input_ or [])
    several = {"threads": counts(threads, "--threads"), "batches": counts(batch, "--batch")}
    from diffprune.bench_lines import bench_lines
    from diffprune.benching import bench as measured
    from diffprune.benching import grid
    from diffprune.runfolder import as_json, write_atomically

    settings = grid(device, **several, runtimes=runtime.split(","), precisions=precision.split(","))
    found = measured(dense, small, settings, shapes=shapes, seconds=seconds, tell=_tell)
    try:
        if json:
            write_atomically(json, as_json(found.as_dict()))
    finally:
        _print(*bench_lines(found))
    if found.failure:
        raise found.failure


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads  [those of the run]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="images at once  [those of the run]")] = None,
) -> None:
    """Say where the time of a run's networks goes, layer by layer.

    Dense beside pruned, from the runtime's own profile: which layers did not get as much faster as they got smaller
    and why, and how close each comes to what this CPU can do.
    """
    from diffprune.explaining import explain_lines

    _print(*explain_lines(run, threads=threads, batch=batch))


@app.command()
def export(
    saved: Annotated[Path, typer.Argument(help="pruned.safetensors of a run")],
    model: Annotated[str, typer.Option(help=f"the dense network it was cut from: {NETWORK}")],
    output: Annotated[Path, typer.Option(help="the ONNX file to write")],
    input_: InputOption = None,
    classes: ClassesOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="DEFAULT or another torchvision name, if the dense network began with it: GoogLeNet and "
            "Inception compute something else then"
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="18 or later")] = 18,
    license: Annotated[str, typer.Option(help="of the weights")] = "unknown",
    mean: Annotated[str | None, typer.Option(help="per channel, with --std: the file takes uint8 (N, H, W, C)")] = None,
    std: Annotated[str | None, typer.Option(help="per channel, and computes (x / 255 - mean) / std itself")] = None,
    preprocessing: Annotated[
        bool, typer.Option(help="with --mean and --std: computed in the file, or only said in its metadata")
    ] = True,
    labels: Annotated[Path | None, typer.Option(help="a text file with the name of a class on each line")] = None,
    static_twin: Annotated[
        bool, typer.Option("--static-twin", help="write OUTPUT-static.onnx, with a fixed batch of 1, too")
    ] = False,
) -> None:
    """Turn a saved network into an ONNX file, with a model card and a manifest beside it.

    The file is checked: it is dense, onnxruntime computes with it what the network computes, and written again it has
    the same bytes.
    """
    shape = image_shape(input_, model)
    pixels = numbers(mean, "--mean"), numbers(std, "--std")
    if (mean is None) != (std is None):
        raise bad_option("one of --mean and --std is missing", "give both, or neither")
    if mean is None and not preprocessing:
        raise bad_option("--no-preprocessing goes with --mean and --std", "give these as well, or leave it out")
    require_folder(output, "--output")
    if output.suffix.lower() != ".onnx":
        raise bad_option(f"--output is {str(output)!r}", "name a file that ends in .onnx")
    names = lines_of(labels, "--labels") if labels else None
    from diffprune.exporting import export_saved
    from diffprune.models import load_model
    from diffprune.pruned import Origin, about
    from export import Preprocessing

    known = None if mean is None else Preprocessing(*pixels)
    if known and not preprocessing and not known.fits(shape[0]):
        raise bad_option(
            f"--mean {mean} and --std {std} do not normalise {shape[0]} channels", "give each a number, std above 0"
        )
    said = about(model, weights, license, shape) | (known.normalisation() if known else {})
    shipped = export_saved(
        saved, output, lambda: load_model(model, weights=weights, num_classes=classes), Origin(classes, names, said),
        opset=opset, preprocessing=known if preprocessing else None, twin=static_twin,
    )  # fmt: skip
    for file in shipped.files:
        _print(
            f"{file.path}: {file.size / 1e6:.2f} MB, opset {file.opset}, "
            f"largest relative difference to the network {file.parity.worst:.1e}",
            f"sha256 {file.sha256}",
        )
    _print(f"said in {shipped.card}, listed in {shipped.manifest}")


@app.command()
def verify(run: Annotated[Path, typer.Argument(help="the folder of a finished run")]) -> None:
    """Check that a run still holds, on this machine.

    Every file against manifest.json, the ONNX files against the saved network, their bytes by writing them again, the
    claimed speed-up by measuring it. Runs the run's own factory, if it has one. The exit code is 1 if a check fails.
    """
    from diffprune.verification import verify as checks

    failures, skipped = [], []
    for check in checks(run):
        result = "FAIL" if check.failure else "skip" if check.skipped else "pass"
        _print(f"{result}  {check.name:<34}  {check.failure or check.found}")
        failures += [check.name] if check.failure else []
        skipped += [check.name] if check.skipped else []
    if skipped:
        _print("", f"not checked: {', '.join(skipped)}")
    held = "all else holds" if skipped else "everything holds"
    _print("", f"{len(failures)} checks failed: {', '.join(failures)}" if failures else held)
    if failures:
        raise typer.Exit(1)


@app.command()
def quantize(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    precision: Annotated[str, typer.Option(help="int8, or fp16 for GPUs")] = "int8",
    target: Annotated[
        str | None, typer.Option(help="of int8: x86 (this CPU), x86-vnni, x86-avx2 or tensorrt  [x86]")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="where the data of the run lies here, as for compress  [as the run has it]")
    ] = None,
) -> None:
    """Make the pruned network of a run smaller still.

    Calibrates on training images, writes pruned-int8.onnx or pruned-fp16.onnx into the folder, and measures what that
    gains and costs.
    """
    from diffprune.progress import Progress
    from diffprune.quantized import quantized_lines
    from diffprune.quantizing import quantize_run

    with Progress() as progress:
        report = quantize_run(run, precision=precision, target=target, data=data, on_event=progress)
    _print("", *quantized_lines(report))


def main() -> None:
    """Exit codes: 0 done, 1 verified and something does not hold, 2 refused, 130 interrupted.

    What fails or is refused says what, where, effect and fix.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without arrows shows what it can
    try:
        with Interrupts():
            app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo(STOPPED, err=True)
        raise
    except Exception as error:
        if Interrupts.heard:  # an import that is interrupted may raise anything
            typer.echo(STOPPED, err=True)
            sys.exit(INTERRUPTED)
        said = last_words(error)
        if said is None:
            raise
        typer.echo(said, err=True)
        sys.exit(2)


def _print(*lines: Any) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(spelled(line) if isinstance(line, str) else line)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _run(config: Any) -> None:
    from diffprune.progress import Progress
    from diffprune.report import summary_table, warnings
    from diffprune.run import run

    def tell(event: dict[str, Any]) -> None:
        interrupts.check()
        progress(event)

    interrupts = Interrupts()
    with Progress() as progress, interrupts:
        finished = run(config, on_event=tell)
    report = finished.report
    _print(
        "",
        summary_table(report),
        "",
        report["verdict"],
        *(f"warning: {text}" for text in warnings(report) if text not in progress.warned),
        f"everything is in {finished.folder}; open {finished.folder / 'report.html'}",
        f"check it, here or elsewhere: diffprune verify {finished.folder}",
    )
