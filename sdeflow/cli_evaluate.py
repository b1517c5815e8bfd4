"""The command `sdeflow evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow._files import check_writable
from sdeflow.cli_sample import pick_device
from sdeflow.distributed import this_rank
from sdeflow.evaluation import METRICS, Evaluation, Sampling, compare
from sdeflow.evaluation import evaluate as run_evaluation
from sdeflow.metrics import ENOUGH
from sdeflow.models.checkpoint import BUNDLED, load

WHAT, HOW, MACHINE = "What", "How samples of a model are drawn", "Machine and files"
RESULT = "evaluation.json"
EPILOG = """
Examples:

    sdeflow evaluate pictures/ --reference train.parquet --floor test.parquet

    sdeflow evaluate pictures/ --reference train.parquet --statistics stats/     measured once, then read

    sdeflow evaluate pictures/ --reference train.parquet --metrics fid,precision,recall --weights inception.pth

    sdeflow evaluate cifar10 --reference train.parquet --n 10000 --nfe 18 --out nfe18.json

    sdeflow evaluate --compare stats/a.safetensors stats/b.safetensors

    torchrun --nproc-per-node 2 -m sdeflow evaluate pictures/ --reference train.parquet
"""


def evaluate(
    samples: Annotated[
        str | None,
        typer.Argument(
            help="A folder of 'sdeflow generate', other pictures, or a model (a bundled one, a .safetensors file)."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="A parquet file, a folder, a hub name, or stored statistics.", rich_help_panel=WHAT),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help=f"Of {', '.join(METRICS)}, with commas.", rich_help_panel=WHAT)
    ] = "fd_cifar,precision,recall",
    floor: Annotated[
        str | None, typer.Option(help="Other real pictures: what they score stands beside.", rich_help_panel=WHAT)
    ] = None,
    compare_: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare", metavar="A B", help="The distance of two sets: statistics or pictures.", rich_help_panel=WHAT
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps the reference's statistics, which are then read.", rich_help_panel=WHAT),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a reference that has splits.", rich_help_panel=WHAT)] = "train",
    k: Annotated[
        int, typer.Option(help="Nearest neighbours of precision and recall.", min=1, rich_help_panel=WHAT)
    ] = 3,
    n: Annotated[
        int | None, typer.Option(help="The first so many; of a model 50000 by default.", min=2, rich_help_panel=WHAT)
    ] = None,
    reference_n: Annotated[
        int | None, typer.Option(help="The first so many of the reference.", min=2, rich_help_panel=WHAT)
    ] = None,
    nfe: Annotated[int | None, typer.Option(help="Network calls a sample.", rich_help_panel=HOW)] = None,
    solver: Annotated[
        str | None, typer.Option(help="A name from 'sdeflow info solvers' (default: auto).", rich_help_panel=HOW)
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Names or numbers, with commas, taken in turn; 'none' for no label.", rich_help_panel=HOW),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first sample (default: 0).", rich_help_panel=HOW)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The result, JSON (default: evaluation.json, in the samples' folder).", rich_help_panel=MACHINE
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The file of Inception's weights; fetched without it.", rich_help_panel=MACHINE)
    ] = None,
    cifar_weights: Annotated[
        Path | None, typer.Option(help="Another feature network for fd_cifar.", rich_help_panel=MACHINE)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.", min=1, rich_help_panel=MACHINE)] = 256,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.", rich_help_panel=MACHINE)
    ] = "auto",
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar, no summary.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Score pictures against a reference: Frechet distances, precision, recall, and all that they depend on, as JSON."""
    rank = this_rank()
    place = pick_device(device)
    if (samples is None) == (compare_ is None):
        raise ValueError("name the pictures to evaluate, or two sets with --compare; not both")
    out = _out(out, samples)
    if rank.first and out is not None:
        check_writable(out, "result")
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    files: dict[str, Any] = {"weights": weights, "cifar_weights": cifar_weights, "device": place, "progress": not quiet}
    if compare_ is not None:
        given = [name for name in names if name in ("fid", "fd_cifar")]
        result = compare(*compare_, given[0] if given else "fd_cifar", split=split, **files)
    else:
        assert samples is not None
        drawing: dict[str, Any] = {
            key: value for key, value in {"nfe": nfe, "solver": solver, "seed": seed}.items() if value is not None
        }
        if classes is not None:
            drawing["classes"] = (
                classes if classes in ("all", "none") else [c.strip() for c in classes.split(",") if c.strip()]
            )
        if _is_model(samples):
            source: Any = load(samples, rank.device(place))
            sampling = Sampling(n=n or ENOUGH, batch_size=batch_size, **drawing)
        elif drawing:
            raise ValueError(
                f"{', '.join('--' + name for name in drawing)}: how samples are drawn is for a model; {samples} is none"
            )
        else:
            source, sampling = samples, None
        result = run_evaluation(
            source, reference, names, sampling=sampling, floor=floor, statistics=statistics, split=split, n=n,
            reference_n=reference_n, k=k, batch_size=batch_size, **files,
        )  # fmt: skip
    if rank.first:
        _tell(result, out, quiet)


def _is_model(samples: str) -> bool:
    return (samples in BUNDLED or samples.endswith(".safetensors")) and not Path(samples).is_dir()


def _out(out: Path | None, samples: str | None) -> Path | None:
    """Where the result goes; a comparison is written only where it is asked for."""
    if out is not None or samples is None:
        return out
    return Path(samples) / RESULT if Path(samples).is_dir() else Path(RESULT)


def _tell(result: Evaluation, out: Path | None, quiet: bool) -> None:
    if out is not None:
        result.save(out)
    if not quiet or out is None:
        typer.echo(str(result))
        if out is not None:
            typer.echo(f"{'written':<10} {out}")
