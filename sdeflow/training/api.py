"""Training a denoiser: the loop behind `sdeflow train`.

Everything random at step k is drawn from generators seeded with (seed, k, rank), and the learning
rate is a function of the number of images seen. So a training's future depends on its saved state
alone. Stopped anywhere (by Ctrl-C, SIGTERM, a time limit, or kill -9 after its last save) and
resumed, it reaches the same weights, bit for bit where kernels are deterministic.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sdeflow._utils import distributed
from sdeflow._utils.files import check_writable
from sdeflow._utils.lock import locked
from sdeflow._utils.run_control import Log, Stop, attempted, machine
from sdeflow.errors import CheckpointError, NonFiniteError
from sdeflow.images.datasets import Images, Stream, load_images
from sdeflow.images.render import grid, save_png
from sdeflow.models import UNetConfig
from sdeflow.models.checkpoint import Pretrained, load, save_model
from sdeflow.models.ema.posthoc import drop_snapshots, model_facts, write_snapshot
from sdeflow.sampling.api import sample
from sdeflow.sampling.inputs import named_device
from sdeflow.training.config import TrainConfig
from sdeflow.training.trainer import FIXED, Trainer, latest_state, previous

STATE = "state.safetensors"
LOG = "log.jsonl"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended: after `images` images in total, with the last logged `loss`.
    `reason` says why it stopped early: `"SIGINT"`, `"SIGTERM"`, `"time limit"`.
    """

    denoiser: Pretrained
    images: int
    seconds: float
    loss: float
    finished: bool
    out: Path
    reason: str = ""


def train(
    config: TrainConfig,
    dataset: Any = None,
    *,
    resume: bool = False,
    export: str | Path | None = None,
) -> TrainResult:
    """Train a UNet on images, into the folder `config.out`.

    `dataset` is anything that `load_images` takes; by default `config.data`.

    The folder gets the last two states, the log, grids of samples and, at the end of each call, the
    averaged network for inference (`model.safetensors`, copied to `export` too). With `resume` it
    continues from the folder's state, if there is one, and where that is damaged from the one
    before it, with a warning. Under torchrun all processes train together. Raises `CheckpointError`
    if the folder holds a training and `resume` is not given or does not fit, and `NonFiniteError`
    if the loss is not finite; the last saved state then stays.
    """
    stop = Stop(config.max_seconds)
    rank = distributed.this_rank()
    out, device = Path(config.out), rank.device(named_device(config.device))
    if holds_state(out / STATE) and not resume:
        raise CheckpointError(
            f"{out} already holds a training; continue it with --resume, or choose another folder"
            " with --out"
        )
    if rank.first:
        check_writable(out / STATE, "training state")
    devices = [device] if device.type == "cuda" else []
    with (
        stop.listening(),
        locked(out, "sdeflow train", rank.first),
        distributed.joined(rank, device),
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=device.type == "cuda", allow_tf32=True),
    ):
        source = config.data if dataset is None else dataset
        images = load_images(source, split=config.split, size=config.size, progress=rank.first)
        going_on = resume and holds_state(out / STATE)
        init = None if going_on or config.init is None else load(config.init, "cpu")
        config = fit_to_data(config, images, init)
        trainer = Trainer(config, device, rank, init)
        if going_on:
            trainer.load(out / STATE)
            if distributed.anyone(not trainer.keeps, device) and trainer.keeps:
                raise CheckpointError(
                    f"another process found {out / STATE} damaged, and this one did not: let all of"
                    " them see the same folder, and resume again"
                )
            if rank.first:
                drop_snapshots(out, trainer.seen)
        try:
            return _run(trainer, images, stop, Path(export) if export else None)
        finally:
            trainer.release()


def fit_to_data(config: TrainConfig, images: Images, init: Pretrained | None = None) -> TrainConfig:
    """The configuration with the model's size and classes taken from the data.

    With `init` the model is like that one in all but its dropout.
    """
    if init is None:
        model = replace(config.model, size=images.size, num_classes=images.num_classes)
        return replace(config, model=model, size=images.size)
    begun: UNetConfig = init.network.config  # type: ignore[attr-defined]
    if (begun.size, begun.num_classes) != (images.size, images.num_classes):
        raise CheckpointError(
            f"{config.init} knows {begun.num_classes} classes of {begun.size}x{begun.size} pixels,"
            f" and the data are {images.num_classes} of {images.size}x{images.size}: begin from a"
            " checkpoint of the same kind, or without init"
        )
    model = replace(begun, dropout=config.model.dropout)
    return replace(config, model=model, size=images.size, sigma_data=init.sigma_data)


def _run(trainer: Trainer, images: Images, stop: Stop, export: Path | None) -> TrainResult:
    config, rank, out = trainer.config, trainer.rank, Path(trainer.config.out)
    stream = Stream(images, config.batch_size, config.seed, rank, trainer.device)
    log = Log(out / LOG, trainer.step) if rank.first else None
    run: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from": trainer.images,
        "to": trainer.images,
        "seconds": 0.0,
        "machine": machine(trainer.device, rank.world),
        "torch": torch.__version__,
        "precision": trainer.precision,
    }
    trainer.runs.append(run)
    before, loss = trainer.seconds, math.nan
    began = saved = window_began = time.monotonic()
    window, window_step = torch.zeros(2, device=trainer.device), trainer.step
    rows = 8 if trainer.device.type == "cuda" else 2
    # How often the processes agree on stopping, which makes them wait for each other.
    every = 1 if rank.world == 1 else 20

    def account() -> None:
        run["to"], run["seconds"] = trainer.images, round(time.monotonic() - began, 3)
        trainer.seconds = before + run["seconds"]

    shown = {"unit": "img", "unit_scale": True, "mininterval": 1.0, "dynamic_ncols": True}
    with tqdm(total=config.images, initial=trainer.images, disable=not rank.first, **shown) as bar:
        if trainer.compiled and rank.first:
            bar.write("compiling the network: a minute or two before the first step ...")
        while trainer.step < config.steps:
            if trainer.step % every == 0 and distributed.anyone(stop.asked, trainer.device):
                break
            step_loss, norm = trainer.advance(stream)
            window += torch.stack([step_loss, norm])
            bar.update(config.batch_size)
            if trainer.step % config.log_steps == 0 or trainer.step == config.steps:
                steps = trainer.step - window_step
                loss, mean_norm = (distributed.mean_(window) / steps).tolist()
                now = time.monotonic()
                speed = steps * config.batch_size / (now - window_began)
                window, window_began, window_step = torch.zeros_like(window), now, trainer.step
                account()
                if not math.isfinite(loss) or not math.isfinite(mean_norm):
                    kept = "no state had been saved yet."
                    if (out / STATE).exists():
                        kept = f"the last good state is kept in {out / STATE}."
                    raise NonFiniteError(
                        f"the loss is {loss} and the gradients' norm {mean_norm} by step"
                        f" {trainer.step} (learning rate {config.lr_at(trainer.step - 1):.3g});"
                        f" {kept} Try a smaller --lr, or --precision float32"
                    )
                bar.set_postfix(loss=f"{loss:.4f}", img_s=f"{speed:.0f}", refresh=False)
                if log:
                    line = {"step": trainer.step, "images": trainer.images, "loss": round(loss, 6)}
                    line |= {"images_per_second": round(speed, 1)}
                    line |= {"lr": config.lr_at(trainer.step - 1), "grad_norm": round(mean_norm, 5)}
                    log.write(line | {"seconds": round(trainer.seconds, 2)})
            if rank.first and crossed(trainer.images, config.batch_size, config.sample_images):
                path = out / f"samples-{trainer.images:09d}.png"
                draw_grid(trainer.denoiser(images.class_names), path, trainer.autocast, rows)
            if rank.first and crossed(trainer.images, config.batch_size, config.snapshot_images):
                with attempted("store the averages, and train on"):
                    store_averages(trainer, images)
            if rank.first and 0 < config.save_seconds <= time.monotonic() - saved:
                account()
                with attempted("save the state, and train on"):
                    trainer.save(out / STATE)
                saved = time.monotonic()
    account()
    finished = trainer.step >= config.steps
    denoiser = trainer.denoiser(images.class_names, card(trainer, images))
    if rank.first:
        try:
            trainer.save(out / STATE)
        finally:  # the network is smaller: the disk may have room for it alone
            export_model(trainer, denoiser, [out / MODEL, *([export] if export else [])])
        if trainer.averages:
            with attempted("store the averages"):
                store_averages(trainer, images)
        if not stop.reason.startswith("SIG"):  # after a signal there may be little time
            with attempted("draw samples"):
                draw_grid(denoiser, out / "samples.png", trainer.autocast, rows)
        if not finished:
            print(
                f"stopped ({stop.reason or 'another process'}) at {trainer.images} of"
                f" {config.images} images; continue with: sdeflow train --out {out} --resume"
            )
    distributed.barrier()
    reason = "" if finished else stop.reason
    return TrainResult(denoiser, trainer.images, trainer.seconds, loss, finished, out, reason)


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether a multiple of `every` lies in the last `batch` of `images`."""
    return every > 0 and images // every > (images - batch) // every


def card(trainer: Trainer, images: Images) -> dict[str, Any]:
    """The facts of a training, for the checkpoint and its model card."""
    config, begun = trainer.config, {}
    if trainer.begun_from:
        begun = {"begun_from": trainer.begun_from, "images_before": trainer.before}
    return {
        "data": images.name,
        "data_images": images.count,
        "images": trainer.images,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "runs": trainer.runs,
        **begun,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "loss": config.objective.describe(),
        "settings": config.to_dict(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def store_averages(trainer: Trainer, images: Images) -> None:
    """Store the averages with power profiles in the training's folder, for `sdeflow ema`."""
    config = trainer.config
    same = {name: value for name, value in config.to_dict().items() if name in FIXED}
    facts = model_facts(
        trainer.network,
        training=same,
        sigma_data=config.sigma_data,
        class_names=images.class_names,
        card=card(trainer, images),
    )
    write_snapshot(config.out, trainer.averages, trainer.seen, facts)


def export_model(trainer: Trainer, denoiser: Pretrained, paths: list[Path]) -> None:
    """Write the averaged network in half precision to each of `paths`.

    A model card in Markdown is written beside each.
    """
    for path in paths:
        save_model(
            path,
            trainer.network,
            parameters=trainer.ema.state_dict(),
            sigma_data=trainer.config.sigma_data,
            nsr_range=denoiser.nsr_range,
            class_names=denoiser.class_names,
            card=denoiser.card,
        )
        path.with_suffix(".md").write_text(card_markdown(denoiser.card))


def card_markdown(facts: Mapping[str, Any]) -> str:
    """A model card as Markdown."""
    lines = ["# Model card", ""]
    for key, value in facts.items():
        if key == "runs":
            head = "| run | from image | to image | seconds | machine | PyTorch | precision |"
            keys = ("started", "from", "to", "seconds", "machine", "torch", "precision")
            rows = [f"| {' | '.join(str(run[key]) for key in keys)} |" for run in value]
            lines += ["", head, "|---" * len(keys) + "|", *rows, ""]
        elif key == "settings":
            lines += ["", "```json", json.dumps(value, indent=2), "```", ""]
        else:
            lines.append(f"- {key.replace('_', ' ')}: {value}")
    return "\n".join(lines) + "\n"


def draw_grid(
    denoiser: Pretrained, path: Path, autocast: Callable[[], Any] = nullcontext, rows: int = 8
) -> None:
    """Write a PNG of `rows` samples of each class (or 8 columns of them), with fixed seeds."""
    columns = min(denoiser.num_classes, 16) or 8
    label = {"label": torch.arange(columns).repeat(rows)} if denoiser.num_classes else {}
    names = denoiser.class_names[:columns] * rows if len(denoiser.class_names) >= columns else None
    with autocast(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        x0 = sample(denoiser, n=rows * columns, seeds=0, condition=label)
    seeds = f"0..{rows * columns - 1}"
    facts = {"images": denoiser.card.get("images"), "solver": "default", "seeds": seeds}
    save_png(path, grid(x0, columns, labels=names, zoom=2, resample="nearest", gap=2), facts)


def stored_config(out: str | os.PathLike[str]) -> TrainConfig | None:
    """The configuration of the training in the folder `out`, or None if there is none."""
    path = Path(out) / STATE
    return TrainConfig.from_dict(latest_state(path)[1]["config"]) if holds_state(path) else None


def holds_state(path: Path) -> bool:
    """Whether a training's state is there, or the one before it."""
    return path.exists() or previous(path).exists()
