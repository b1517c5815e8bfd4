"""The state of a training and its step; `sdeflow.training.api` drives it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow._utils import distributed
from sdeflow._utils.checks import differing
from sdeflow.denoisers import Preconditioned
from sdeflow.errors import CheckpointError, NonFiniteError
from sdeflow.images.datasets import Stream, mix, prepared
from sdeflow.models import EMA, UNet
from sdeflow.models.checkpoint import Pretrained, read_tensors, write_tensors
from sdeflow.models.ema.power import PowerEMA
from sdeflow.training.config import TrainConfig
from sdeflow.training.cuda_graph import GraphedStep, Work

STATE_FORMAT = "sdeflow-training-1"
FIXED = (
    *("model", "batch_size", "seed", "flip", "nsr_mean", "nsr_std", "sigma_data"),
    *("loss", "label_dropout", "split", "size", "init"),
)
"""Settings that cannot change during a training: with others it would be another one."""


class Gradients:
    """All gradients in one flat buffer, laid out as their parameters are.

    One all-reduce, one norm and one scaling serve for all of them.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        # Each begins at a multiple of 128 bytes.
        sizes = [-(-p.numel() // 32) * 32 for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), device=self.parameters[0].device)
        parts = zip(self.parameters, self.flat.split(sizes), strict=True)
        self.views = [part.as_strided(p.shape, p.stride()) for p, part in parts]

    @torch.no_grad()
    def collect(self, clip: float) -> Tensor:
        """Average the gradients over processes and clip them to norm `clip`.

        Returns their norm before the clipping.
        """
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
    """The state of a training, and its step.

    It holds network, averages, optimizer and the number of steps done.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        rank: distributed.Rank,
        init: Pretrained | None = None,
    ) -> None:
        self.config, self.device, self.rank = config, device, rank
        self.step, self.seconds = 0, 0.0
        self.runs: list[dict[str, Any]] = []
        self.keeps = True
        self.begun_from = "" if init is None else describe_start(config.init or "", init)
        self.before = 0 if init is None else seen_by(init)
        torch.manual_seed(mix(config.seed, 0))  # the same network on every rank
        self.network = self.build().to(device)
        if init is not None:
            self.network.load_state_dict(init.network.state_dict())  # type: ignore[attr-defined]
        self.ema = EMA(self.network, config.ema, config.ema_warmup)
        self.averages = [
            PowerEMA(self.network, std) for std in config.snapshot_stds if config.snapshot_images
        ]
        self.gradients = Gradients(self.network)
        self.generator = torch.Generator(device)
        self.objective = config.objective
        gpu = device.type == "cuda"
        # On a GPU the learning rate is a tensor, which a CUDA graph can read.
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            torch.tensor(config.lr, device=device) if gpu else config.lr,
            (config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=gpu,
            capturable=gpu,
        )
        for parameter in self.network.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device if gpu else None),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        self.precision = "bf16" if bf16 else "float32"
        self.compiled = config.compile if config.compile is not None else gpu
        self.forward: Callable[..., Tensor] = self.network
        if self.compiled:
            self.forward = torch.compile(self.network, fullgraph=True, dynamic=False)
        if config.graphs and not gpu:
            raise ValueError(
                "graphs=True (--graphs) replays steps as CUDA graphs, and this training is on"
                f" {device}; leave it out"
            )
        graphed = gpu and config.graphs is not False
        self.work: Work = GraphedStep(self._work, self.generator) if graphed else self._work

    def build(self) -> UNet:
        """The network with its first weights; a comparison puts another in its place."""
        return UNet(self.config.model)

    @property
    def images(self) -> int:
        """How many images have been seen."""
        return self.step * self.config.batch_size

    @property
    def seen(self) -> int:
        """How many images the weights have seen, before this training too.

        This is the time of the averages' profiles.
        """
        return self.before + self.images

    def advance(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """One step; returns the loss and the gradients' norm, on the device."""
        config = self.config
        seed = mix(config.seed, 2, self.step, self.rank.index)
        self.generator.manual_seed(seed)
        torch.manual_seed(mix(seed, 1))  # dropout
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(config.lr_at(self.step))
            else:
                group["lr"] = config.lr_at(self.step)
        loss, norm = self.work(*stream.pixels(self.step))
        self.step += 1
        self.ema.update(self.network, self.images, config.batch_size)
        for average in self.averages:
            average.update(self.network, self.seen, config.batch_size)
        return loss, norm

    def release(self) -> None:
        """Free the captured step. NCCL may wait for graphs that hold its sums when a group ends."""
        self.work = self._work

    def _work(self, pixels: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a step does on the device, and nothing else.

        Once captured, this code does not run again.
        """
        x0 = prepared(pixels, self.generator if self.config.flip else None)
        with self.autocast():
            model = Preconditioned(self.forward, self.config.sigma_data)
            condition = {} if label is None else {"label": label}
            loss = self.objective(model, x0, generator=self.generator, **condition).mean()
        loss.backward()
        norm = self.gradients.collect(self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def _tensors(self) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        parts = {f"model.{n}": p.detach() for n, p in named.items()}
        parts |= {f"ema.{n}": p for n, p in self.ema.state_dict().items()}
        for average in self.averages:
            parts |= {f"power-{average.std:g}:{n}": p for n, p in average.state_dict().items()}
        for key in ("exp_avg", "exp_avg_sq"):
            parts |= {f"{key}.{name}": self.optimizer.state[p][key] for name, p in named.items()}
        return parts

    def save(self, path: Path) -> None:
        """Write all of it, atomically; the state before it stays as `previous(path)`. Refuses
        (`NonFiniteError`) to replace a good state by one that is not finite.
        """
        weights = [p.detach() for p in self.network.parameters()]
        norm = torch.stack(torch._foreach_norm(weights)).sum()
        if not math.isfinite(norm.item()):
            raise NonFiniteError(
                f"not saved: the network's parameters are not finite after step {self.step}"
            )
        facts = {
            "format": STATE_FORMAT,
            "config": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "runs": self.runs,
            "begun_from": self.begun_from,
            "before": self.before,
        }
        # A damaged state, which `load` has passed over, takes no sound one's place.
        write_tensors(path, self._tensors(), facts, previous(path) if self.keeps else None)
        self.keeps = True

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Continue from what `save` wrote, or from what it wrote before where that is damaged (with
        a warning); raises `CheckpointError` if both are damaged, or it is another training.
        """
        tensors, facts, passed_over = latest_state(path)
        if passed_over and self.rank.first:
            warnings.warn(
                f"{passed_over}. The training goes on from the state before it, in"
                f" {previous(path).name}, at {facts['step'] * self.config.batch_size} images",
                RuntimeWarning,
                stacklevel=3,
            )
        self.keeps = not passed_over
        stored = TrainConfig.from_dict(facts["config"])
        for name in FIXED:
            old, new = getattr(stored, name), getattr(self.config, name)
            if name == "model":  # say what of it differs
                old, new = differing(old.to_dict(), new.to_dict())
            if old != new:
                raise CheckpointError(
                    f"{path} was trained with {name}={old}, not {new}, which would be another"
                    " training; leave that option out, or start afresh in another folder"
                )
        own = self._tensors()
        # Averages may be added or left out at any time: a new one begins with the present weights.
        if _without_averages(own) != _without_averages(tensors):
            raise CheckpointError(
                f"{path} holds another network's tensors; start afresh in another folder"
            )
        for name, value in own.items():
            weights = f"model.{name.partition(':')[2]}"
            value.copy_(tensors[name if name in tensors else weights])
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
        self.runs = list(facts["runs"])
        self.begun_from = str(facts.get("begun_from", ""))
        self.before = int(facts.get("before", 0))
        for state in self.optimizer.state.values():
            state["step"].fill_(self.step)

    def denoiser(
        self, class_names: tuple[str, ...] = (), card: Mapping[str, Any] | None = None
    ) -> Pretrained:
        """The averaged network as a denoiser."""
        network = self.ema.averaged(self.network)
        assert isinstance(network, UNet)
        return Pretrained(network, self.config.sigma_data, class_names=class_names, card=card)


def _without_averages(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("power-")}


def describe_start(name: str, init: Pretrained) -> str:
    """The checkpoint that a training begins with, in words.

    It says what that one had seen, and where its own training began.
    """
    card = init.card
    before = f", begun from {card['begun_from']}" if card.get("begun_from") else ""
    return (
        f"{Path(name).name} ({card.get('images', 'unknown')} images in"
        f" {card.get('seconds', 'unknown')} s{before})"
    )


def seen_by(init: Pretrained) -> int:
    """How many images a checkpoint's weights have seen, as far as its card says."""
    return int(init.card.get("images", 0)) + int(init.card.get("images_before", 0))


def previous(path: Path) -> Path:
    """Where the state before the one in `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def latest_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors and facts of the newest sound state, and what is wrong with the one that was
    passed over, if any. `CheckpointError` where neither `path` nor the one before it is sound.
    """
    try:
        return *read_state(path), ""
    except CheckpointError as error:
        if not previous(path).is_file():
            raise
        try:
            return *read_state(previous(path)), str(error)
        except CheckpointError as other:
            raise CheckpointError(f"{error}. So is the state before it: {other}") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a training's state; raises `CheckpointError` if it is not one."""
    remedy = (
        "begin a new training in another folder; its averaged network, where model.safetensors is"
        " there, is a beginning: --init FOLDER/model.safetensors"
    )
    tensors, facts = read_tensors(path, remedy)
    if facts.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path} is not the state of a training, but {facts.get('format', 'something else')!r}"
        )
    return tensors, facts
