"""Training a denoiser: the loop behind `sdeflow train`.

Everything random at step k is drawn from generators seeded with (seed, k, rank), and the learning rate is a function of the
number of images seen, so a training's future depends on its saved state alone: stopped anywhere (by Ctrl-C, SIGTERM, a time
limit, or kill -9 after its last save) and resumed, it goes on to the very same weights, bit for bit where kernels are
deterministic.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdeflow import distributed
from sdeflow._files import check_writable
from sdeflow.data import Images, Stream, load_images, mix
from sdeflow.errors import CheckpointError, NonFiniteError
from sdeflow.images import grid, save_png
from sdeflow.losses import EDMLoss
from sdeflow.models import EMA, UNet, UNetConfig
from sdeflow.models.checkpoint import Pretrained, read_tensors, save_model, write_tensors
from sdeflow.runs import Log, Stop, attempted, machine
from sdeflow.sampling import sample

STATE = "state.safetensors"
LOG = "log.jsonl"
MODEL = "model.safetensors"
STATE_FORMAT = "sdeflow-training-1"


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long; a plain value that is stored with the training's state.

    Lengths are counted in training images, so that they do not change with the batch size. `batch_size` is over all
    processes; `lr` rises over `warmup` images and then decays to zero at `images` (`schedule` "cosine" or "linear"; "constant"
    does not decay). `ema` is the half-life of the average. `precision` "auto" is bf16 on a GPU and float32 elsewhere;
    `compile=None` compiles on a GPU. `save_seconds` and `sample_images` say how often the state is saved and a grid drawn (0 =
    only at the end), `log_steps` how often the log gets a line. `max_seconds` ends this invocation, not the training: its
    state is saved and `resume` goes on. Raises `ValueError` for numbers out of range.
    """

    data: str = "uoft-cs/cifar10"
    out: str = "runs/train"
    images: int = 20_000_000
    batch_size: int = 512
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 200_000
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: int = 500_000
    ema_warmup: float = 0.05
    nsr_mean: float = -1.2
    nsr_std: float = 1.2
    sigma_data: float = 0.5
    label_dropout: float = 0.1
    flip: bool = True
    seed: int = 0
    split: str = "train"
    size: int | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    max_seconds: float | None = None
    save_seconds: float = 600.0
    sample_images: int = 2_000_000
    log_steps: int = 100
    model: UNetConfig = field(default_factory=UNetConfig)

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "log_steps", "ema", "ema_warmup", "lr", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TrainConfig: {name} must be positive, got {getattr(self, name)}")
        for name, choices in (
            ("schedule", ("cosine", "linear", "constant")),
            ("precision", ("auto", "bf16", "float32")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"TrainConfig: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

    @property
    def steps(self) -> int:
        """How many steps the whole training has."""
        return math.ceil(self.images / self.batch_size)

    @property
    def loss(self) -> EDMLoss:
        """The loss that the network is trained with."""
        null = self.model.num_classes or None
        return EDMLoss(self.nsr_mean, self.nsr_std, self.sigma_data, self.label_dropout, null)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        seen = (step + 0.5) * self.batch_size
        rise = min(1.0, seen / self.warmup) if self.warmup else 1.0
        rest = min(1.0, max(0.0, seen - self.warmup) / max(1, self.images - self.warmup))
        fall = {"cosine": 0.5 + 0.5 * math.cos(math.pi * rest), "linear": 1 - rest, "constant": 1.0}[self.schedule]
        return self.lr * rise * fall

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; `from_dict` reads it back."""
        return asdict(self) | {"model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration that `to_dict` wrote."""
        return cls(**dict(values) | {"model": UNetConfig.from_dict(values["model"])})


@dataclass(frozen=True)
class TrainResult:
    """How an invocation of `train` ended: after `images` images of the whole training, with the last logged `loss`."""

    denoiser: Pretrained
    images: int
    seconds: float
    loss: float
    finished: bool
    out: Path


class Gradients:
    """All gradients in one flat buffer, laid out as their parameters are: one all-reduce, one norm, one scaling."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        sizes = [-(-p.numel() // 32) * 32 for p in self.parameters]  # each begins at a multiple of 128 bytes
        self.flat = torch.zeros(sum(sizes), device=self.parameters[0].device)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.views = [
            self.flat.as_strided(p.shape, p.stride(), start) for p, start in zip(self.parameters, starts, strict=True)
        ]

    @torch.no_grad()
    def collect(self, clip: float) -> Tensor:
        """Average the gradients over processes, scale them down to norm `clip` if they are larger; their norm before that."""
        for parameter in self.parameters:
            if parameter.grad is None:  # a part of the network that this batch did not use
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_(self.views, [p.grad for p in self.parameters if p.grad is not None])
        distributed.mean_(self.flat)
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        return norm


class Trainer:
    """The state of a training and its step: network, average, optimizer and the number of steps done."""

    def __init__(self, config: TrainConfig, device: torch.device, rank: distributed.Rank) -> None:
        self.config, self.device, self.rank, self.step, self.seconds = config, device, rank, 0, 0.0
        self.runs: list[dict[str, Any]] = []
        torch.manual_seed(mix(config.seed, 0))  # the same network on every rank
        self.network = UNet(config.model).to(device)
        self.ema = EMA(self.network, config.ema, config.ema_warmup)
        self.gradients = Gradients(self.network)
        self.generator = torch.Generator(device)
        gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            config.lr,
            (config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=gpu,
        )
        for parameter in self.network.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device if gpu else None),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu)
        self.autocast: Callable[[], Any] = (
            (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext
        )
        self.precision = "bf16" if bf16 else "float32"
        compiled = config.compile if config.compile is not None else gpu
        self.forward: Callable[..., Tensor] = (
            torch.compile(self.network, fullgraph=True, dynamic=False) if compiled else self.network
        )

    @property
    def images(self) -> int:
        """How many images have been seen."""
        return self.step * self.config.batch_size

    def advance(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """One step; returns the loss and the gradients' norm, on the device."""
        config = self.config
        seed = mix(config.seed, 2, self.step, self.rank.index)
        self.generator.manual_seed(seed)
        torch.manual_seed(mix(seed, 1))  # dropout
        x0, label = stream(self.step, self.generator if config.flip else None)
        with self.autocast():
            loss = config.loss(self.forward, x0, label, self.generator).mean()
        loss.backward()
        norm = self.gradients.collect(config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.network, self.images, config.batch_size)
        return loss.detach(), norm

    def _tensors(self) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        parts = {f"model.{name}": p.detach() for name, p in named.items()} | {
            f"ema.{n}": p for n, p in self.ema.state_dict().items()
        }
        for key in ("exp_avg", "exp_avg_sq"):
            parts |= {f"{key}.{name}": self.optimizer.state[p][key] for name, p in named.items()}
        return parts

    def save(self, path: Path) -> None:
        """Write all of it, atomically; refuses (`NonFiniteError`) to replace a good state by one that is not finite."""
        norm = torch.stack(torch._foreach_norm([p.detach() for p in self.network.parameters()])).sum()
        if not math.isfinite(norm.item()):
            raise NonFiniteError(f"not saved: the network's parameters are not finite after step {self.step}")
        facts = {
            "format": STATE_FORMAT,
            "config": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "runs": self.runs,
        }
        write_tensors(path, self._tensors(), facts)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; raises `CheckpointError` if it is damaged or of another training."""
        tensors, facts = read_state(path)
        stored = TrainConfig.from_dict(facts["config"])
        for name in (
            "model",
            "batch_size",
            "seed",
            "flip",
            "nsr_mean",
            "nsr_std",
            "sigma_data",
            "label_dropout",
            "split",
            "size",
        ):
            old, new = getattr(stored, name), getattr(self.config, name)
            if name == "model" and old != new:  # name the one that differs
                old, new = (
                    {k: v for k, v in a.to_dict().items() if v != b.to_dict()[k]} for a, b in ((old, new), (new, old))
                )
            if old != new:
                raise CheckpointError(
                    f"{path} was trained with {name}={old}, not {new}, and going on would not continue it; "
                    "leave that option out, or start afresh in another folder"
                )
        own = self._tensors()
        if set(own) != set(tensors):
            raise CheckpointError(f"{path} holds another network's tensors; start afresh in another folder")
        for name, value in tensors.items():
            own[name].copy_(value)
        self.step, self.seconds, self.runs = int(facts["step"]), float(facts["seconds"]), list(facts["runs"])
        for state in self.optimizer.state.values():
            state["step"].fill_(self.step)

    def denoiser(self, class_names: tuple[str, ...] = (), card: Mapping[str, Any] | None = None) -> Pretrained:
        """The averaged network as a denoiser."""
        network = self.ema.averaged(self.network)
        assert isinstance(network, UNet)
        return Pretrained(network, self.config.sigma_data, class_names=class_names, card=card)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a training's state; raises `CheckpointError` if it is not one."""
    tensors, facts = read_tensors(path)
    if facts.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{path} is not the state of a training, but {facts.get('format', 'something else')!r}")
    return tensors, facts


def train(
    config: TrainConfig, dataset: Any = None, *, resume: bool = False, export: str | Path | None = None
) -> TrainResult:
    """Train a UNet on `dataset` (anything that `load_images` takes; by default `config.data`) into the folder `config.out`.

    The folder gets the state, the log, grids of samples and, at the end of each invocation, the averaged network for
    inference (`model.safetensors`, copied to `export` too). With `resume` it goes on from the folder's state, if there is one.
    Under torchrun all processes train together. Raises `CheckpointError` if the folder holds a training and `resume` is not
    given or does not fit, and `NonFiniteError` if the loss is not finite; the last saved state then stays.
    """
    stop = Stop(config.max_seconds)
    rank = distributed.this_rank()
    out, device = Path(config.out), rank.device(_device(config.device))
    if (out / STATE).exists() and not resume:
        raise CheckpointError(
            f"{out} already holds a training; go on with --resume, or choose another folder with --out"
        )
    if rank.first:
        check_writable(out / STATE, "training state")
    devices = [device] if device.type == "cuda" else []
    with (
        stop.listening(),
        distributed.joined(rank, device),
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=device.type == "cuda", allow_tf32=True),
    ):
        images = load_images(
            config.data if dataset is None else dataset, split=config.split, size=config.size, progress=rank.first
        )
        config = fit_to_data(config, images)
        trainer = Trainer(config, device, rank)
        if resume and (out / STATE).exists():
            trainer.load(out / STATE)
        return _run(trainer, images, stop, Path(export) if export else None)


def fit_to_data(config: TrainConfig, images: Images) -> TrainConfig:
    """The configuration with the model's size and classes taken from the data."""
    model = replace(config.model, size=images.size, num_classes=images.num_classes)
    return replace(config, model=model, size=images.size)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _run(trainer: Trainer, images: Images, stop: Stop, export: Path | None) -> TrainResult:
    config, rank, out = trainer.config, trainer.rank, Path(trainer.config.out)
    stream = Stream(images, config.batch_size, config.seed, rank, trainer.device)
    log = Log(out / LOG, trainer.step) if rank.first else None
    run: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from": trainer.images,
        "to": trainer.images,
        "seconds": 0.0,
    }
    run |= {"machine": machine(trainer.device, rank.world), "torch": torch.__version__, "precision": trainer.precision}
    trainer.runs.append(run)
    before, began, saved = trainer.seconds, time.monotonic(), time.monotonic()
    loss, window, window_began, window_step = math.nan, torch.zeros(2, device=trainer.device), began, trainer.step
    rows = 8 if trainer.device.type == "cuda" else 2
    every = 1 if rank.world == 1 else 20  # how often the processes agree on stopping, which makes them wait

    def account() -> None:
        run["to"], run["seconds"] = trainer.images, round(time.monotonic() - began, 3)
        trainer.seconds = before + run["seconds"]

    with tqdm(
        total=config.images, initial=trainer.images, unit="img", unit_scale=True, disable=not rank.first, mininterval=1.0,
        dynamic_ncols=True,
    ) as bar:  # fmt: skip
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
                    raise NonFiniteError(
                        f"the loss is {loss} and the gradients' norm {mean_norm} by step {trainer.step} (learning rate "
                        f"{config.lr_at(trainer.step - 1):.3g}); {_kept(out)} Try a smaller --lr, or --precision float32"
                    )
                bar.set_postfix(loss=f"{loss:.4f}", img_s=f"{speed:.0f}", refresh=False)
                if log:
                    log.write(
                        {
                            "step": trainer.step,
                            "images": trainer.images,
                            "loss": round(loss, 6),
                            "images_per_second": round(speed, 1),
                            "lr": config.lr_at(trainer.step - 1),
                            "grad_norm": round(mean_norm, 5),
                            "seconds": round(trainer.seconds, 2),
                        }
                    )
            if rank.first and crossed(trainer.images, config.batch_size, config.sample_images):
                draw_grid(
                    trainer.denoiser(images.class_names),
                    out / f"samples-{trainer.images:09d}.png",
                    trainer.autocast,
                    rows,
                )
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
        finally:  # the network is smaller: it may fit where the state does not
            export_model(trainer, denoiser, [out / MODEL, *([export] if export else [])])
        if not stop.reason.startswith("SIG"):  # who sent a signal is waiting
            with attempted("draw samples"):
                draw_grid(denoiser, out / "samples.png", trainer.autocast, rows)
        if not finished:
            print(f"stopped ({stop.reason or 'another process'}) at {trainer.images} of {config.images} images; "
                  f"go on with: sdeflow train --out {out} --resume")  # fmt: skip
    distributed.barrier()
    return TrainResult(denoiser, trainer.images, trainer.seconds, loss, finished, out)


def _kept(out: Path) -> str:
    return (
        f"the last good state is kept in {out / STATE}." if (out / STATE).exists() else "no state had been saved yet."
    )


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether a multiple of `every` lies in the last `batch` of `images`."""
    return every > 0 and images // every > (images - batch) // every


def card(trainer: Trainer, images: Images) -> dict[str, Any]:
    """The facts of a training, for the checkpoint and its model card."""
    config = trainer.config
    return {
        "data": images.name,
        "data_images": images.count,
        "images": trainer.images,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "runs": trainer.runs,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "loss": config.loss.describe(),
        "settings": config.to_dict(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def export_model(trainer: Trainer, denoiser: Pretrained, paths: list[Path]) -> None:
    """Write the averaged network in half precision to each of `paths`, with a model card in Markdown beside it."""
    for path in paths:
        save_model(
            path, trainer.network, parameters=trainer.ema.state_dict(), sigma_data=trainer.config.sigma_data,
            nsr_range=denoiser.nsr_range, class_names=denoiser.class_names, card=denoiser.card,
        )  # fmt: skip
        path.with_suffix(".md").write_text(card_markdown(denoiser.card))


def card_markdown(facts: Mapping[str, Any]) -> str:
    """A model card as Markdown."""
    lines = ["# Model card", ""]
    for key, value in facts.items():
        if key == "runs":
            lines += [
                "",
                "| run | from image | to image | seconds | machine | PyTorch | precision |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {r['started']} | {r['from']} | {r['to']} | {r['seconds']} | {r['machine']} | {r['torch']} | {r['precision']} |"
                for r in value
            ]
            lines.append("")
        elif key == "settings":
            lines += ["", "```json", json.dumps(value, indent=2), "```", ""]
        else:
            lines.append(f"- {key.replace('_', ' ')}: {value}")
    return "\n".join(lines) + "\n"


def draw_grid(denoiser: Pretrained, path: Path, autocast: Callable[[], Any] = nullcontext, rows: int = 8) -> None:
    """Draw `rows` samples of each class (or 8 columns of them) with fixed seeds, as a PNG."""
    columns = min(denoiser.num_classes, 16) or 8
    label = {"label": torch.arange(columns).repeat(rows)} if denoiser.num_classes else {}
    names = denoiser.class_names[:columns] * rows if len(denoiser.class_names) >= columns else None
    with autocast(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        x0 = sample(denoiser, n=rows * columns, seeds=0, condition=label)
    facts = {"images": denoiser.card.get("images"), "solver": "default", "seeds": f"0..{rows * columns - 1}"}
    save_png(path, grid(x0, columns, labels=names, zoom=2, resample="nearest", gap=2), facts)


def stored_config(out: str | os.PathLike[str]) -> TrainConfig | None:
    """The configuration of the training in the folder `out`, or None if there is none."""
    path = Path(out) / STATE
    return TrainConfig.from_dict(read_state(path)[1]["config"]) if path.exists() else None
