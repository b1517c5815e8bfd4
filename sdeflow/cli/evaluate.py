"""The command `sdeflow evaluate`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow._utils.distributed import this_rank
from sdeflow._utils.files import check_writable
from sdeflow.cli.options import (
    MACHINE,
    DeviceOption,
    QuietOption,
    open_model,
    pick_classes,
    pick_names,
)
from sdeflow.evaluation.api import compare
from sdeflow.evaluation.api import evaluate as run_evaluation
from sdeflow.evaluation.features import EXTRACTORS
from sdeflow.evaluation.metrics import ENOUGH, METRICS
from sdeflow.evaluation.result import Evaluation, title
from sdeflow.evaluation.sampled import Sampling
from sdeflow.models.checkpoint import BUNDLED
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.sampling.inputs import named_device

WHAT, HOW = "What", "How a model is sampled"
RESULT = "evaluation.json"
EPILOG = """
Examples:

    sdeflow evaluate images/ --reference train.parquet --floor test.parquet

    sdeflow evaluate images/ --reference train.parquet --statistics stats/   measured once, then read

    sdeflow evaluate cifar10 --reference train.parquet --n 10000 --nfe 9 --against nfe18.json

    sdeflow evaluate images/ --reference train.parquet --metrics fid,precision --weights file.pth

    sdeflow evaluate cifar10 --reference train.parquet --n 10000 --nfe 18 --out nfe18.json

    sdeflow evaluate cifar10 --reference train.parquet --half --compile   on a GPU, at its fastest

    sdeflow evaluate --compare stats/a.safetensors stats/b.safetensors

    torchrun --nproc-per-node 2 -m sdeflow evaluate images/ --reference train.parquet

Under torchrun write -n, not --n, which its own parser takes for one of its options.
"""


def evaluate(
    samples: Annotated[
        str | None,
        typer.Argument(
            help=(
                "A folder of 'sdeflow generate', other images, or a model (a bundled one, a"
                " .safetensors file)."
            )
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A parquet file, a folder, a hub name, or stored statistics.", rich_help_panel=WHAT
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help=(
                f"Of {', '.join(METRICS)}, with commas (default: fd_cifar, fd_in where it is"
                " installed, precision, recall)."
            ),
            rich_help_panel=WHAT,
        ),
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(
            help="Other real images: what they score, and the excess over it.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another result (JSON): which is better, by each judge.", rich_help_panel=WHAT
        ),
    ] = None,
    compare_: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="The distance of two sets: statistics or images.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="A folder that keeps the reference's statistics, which are then read.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Of a reference that has splits.", rich_help_panel=WHAT)
    ] = "train",
    k: Annotated[
        int,
        typer.Option(
            help="Nearest neighbours of precision and recall.", min=1, rich_help_panel=WHAT
        ),
    ] = 3,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            help="The first so many; of a model 50000 by default.",
            min=2,
            rich_help_panel=WHAT,
        ),
    ] = None,
    reference_n: Annotated[
        int | None,
        typer.Option(help="The first so many of the reference.", min=2, rich_help_panel=WHAT),
    ] = None,
    nfe: Annotated[
        int | None, typer.Option(help="Network calls a sample.", rich_help_panel=HOW)
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="A name from 'sdeflow info solvers' (default: auto).", rich_help_panel=HOW
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names or numbers, with commas, taken in turn; 'none' for no label.",
            rich_help_panel=HOW,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first sample (default: 0).", rich_help_panel=HOW)
    ] = None,
    half: Annotated[
        bool,
        typer.Option("--half", help="Run the model's network in bfloat16.", rich_help_panel=HOW),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help=(
                "Compile the model's network (a minute or so) and run each batch as one CUDA graph."
            ),
            rich_help_panel=HOW,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The result, JSON (default: evaluation.json, in the samples' folder).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="The file of Inception's weights; fetched without it.", rich_help_panel=MACHINE
        ),
    ] = None,
    cifar_weights: Annotated[
        Path | None,
        typer.Option(help="Another feature network for fd_cifar.", rich_help_panel=MACHINE),
    ] = None,
    imagenet_weights: Annotated[
        Path | None,
        typer.Option(
            help="The file of EfficientNet-Lite0's weights, for fd_in without its package.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time.", min=1, rich_help_panel=MACHINE)
    ] = 256,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Score images against a reference: Frechet distances, precision, recall, and all that they
    depend on, as JSON.
    """
    rank = this_rank()
    place = named_device(device)
    if (samples is None) == (compare_ is None):
        raise ValueError("name the images to evaluate, or two sets with --compare; not both")
    out = _out(out, samples)
    if rank.first and out is not None:
        check_writable(out, "result")
    names = None if metrics is None else pick_names(metrics)
    other = None if against is None else Evaluation.load(against)  # before anything is measured
    files: dict[str, Any] = {
        "weights": weights,
        "cifar_weights": cifar_weights,
        "imagenet_weights": imagenet_weights,
        "device": place,
        "progress": not quiet,
    }
    how: dict[str, Any] = {
        "nfe": nfe,
        "solver": solver,
        "seed": seed,
        "compile": compile or None,
    }
    how["classes"] = None if classes is None else pick_classes(classes)
    how = {key: value for key, value in how.items() if value is not None}
    named = [*how, *(["half"] if half else [])]
    if compare_ is not None:
        others = {
            "reference": reference,
            "floor": floor,
            "against": against,
            "statistics": statistics,
            "n": n,
            "reference-n": reference_n,
        }
        if named := [*(name for name, value in others.items() if value is not None), *named]:
            raise ValueError(
                f"{_options(named)}: --compare takes two sets as they are; leave that out"
            )
        given = [name for name in names or () if name in EXTRACTORS]
        result = compare(*compare_, given[0] if given else "fd_cifar", split=split, **files)
    else:
        assert samples is not None
        source: Any = samples
        sampling = None
        if _is_model(samples):
            source = open_model(samples, rank.device(place), half, compile)
            sampling = Sampling(n=n or ENOUGH, batch_size=batch_size, model=samples, **how)
        elif not Path(samples).exists() and samples.count("/") != 1:
            raise ValueError(
                f"{samples!r} is neither a folder or file of images nor a model: those are"
                f" {', '.join(sorted(BUNDLED))}, and .safetensors files that sdeflow train wrote"
            )
        elif named:
            raise ValueError(
                f"{_options(named)}: how samples are made is for a model; {samples} is none"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileWarning)  # the summary says it
            result = run_evaluation(
                source, reference, names, sampling=sampling, floor=floor, statistics=statistics,
                split=split, n=n, reference_n=reference_n, k=k, batch_size=batch_size, **files,
            )  # fmt: skip
    if rank.first:
        _report(result, out, quiet, against, other)


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _is_model(samples: str) -> bool:
    return (samples in BUNDLED or samples.endswith(".safetensors")) and not Path(samples).is_dir()


def _out(out: Path | None, samples: str | None) -> Path | None:
    """Where the result goes; a comparison is written only where it is asked for."""
    if out is not None or samples is None:
        return out
    return Path(samples) / RESULT if Path(samples).is_dir() else Path(RESULT)


def _report(
    result: Evaluation,
    out: Path | None,
    quiet: bool,
    against: Path | None,
    other: Evaluation | None,
) -> None:
    if out is not None:
        result.save(out)
    if not quiet or out is None:
        typer.echo(str(result))
        if other is not None:
            typer.echo(f"{'against':<10} {against}: {_verdict(result.against(other))}")
        if out is not None:
            typer.echo(f"{'written':<10} {out}")


def _verdict(verdicts: dict[str, str]) -> str:
    """What each judge says, and whether they agree."""
    text = ", ".join(f"{title(name)} {verdict}" for name, verdict in verdicts.items())
    if {"better", "worse"} <= set(verdicts.values()):
        return f"{text}; the judges disagree"
    if len(set(verdicts.values())) > 1:
        return f"{text}; only one of the judges sees a difference"
    return text
