"""What to train, on what, for how long: a plain value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sdeflow._utils.checks import one_of, positive_number
from sdeflow._utils.options import option
from sdeflow.losses import (
    P2,
    EDMLoss,
    FlowMatching,
    LabelDropout,
    Loss,
    MinSNR,
    Simple,
)
from sdeflow.models import UNetConfig
from sdeflow.process import VP, RectifiedFlow

LENGTH, MACHINE = "Length and optimizer", "Machine and files"

LOSSES: dict[str, Loss] = {
    "eps": Simple("eps", path=VP(), stratified=True),
    "x0": Simple("x0", path=VP(), stratified=True),
    "v": Simple("v", path=VP(), stratified=True),
    "flow": FlowMatching(path=RectifiedFlow(), stratified=True),
    "min_snr": Simple(weight=MinSNR(5.0), path=VP(), stratified=True),
    "p2": Simple(weight=P2(), path=VP(), stratified=True),
}
"""What `--loss` names beside "edm". The network stands behind EDM's preconditioning in all of them:
a loss chooses the weight of each noise level, and how often it is drawn (uniformly over the time of
VP or of rectified flow, within the network's range of noise).
"""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long.

    A plain value that is stored with the training's state.

    Lengths are counted in training images, so that they do not change with the batch size.
    `batch_size` is over all processes; `lr` rises over `warmup` images and then decays to zero at
    `images` (`schedule` "cosine" or "linear"; "constant" does not decay). `ema` is the half-life
    of the average; every `snapshot_images` images (0 = never) averages with power profiles of the
    relative widths `snapshot_stds` are stored, of which `sdeflow ema` makes one of any length.
    `init` is a checkpoint (bundled, or a file) with whose weights a new training begins. The
    network is then like that one except for its dropout. The profiles of the averages begin where
    the checkpoint's training did, as if its weights had been there from the start. `precision`
    "auto" is bf16 on a GPU and float32 elsewhere; `compile=None` compiles on a GPU, and
    `graphs=None` replays each step there as one CUDA graph. `save_seconds` and `sample_images` say
    how often the state is saved and a grid of samples written (0 = only at the end), `log_steps`
    how often the log gets a line. `max_seconds` ends this run, not the training: its state is
    saved and `resume` continues it. Raises `ValueError` for numbers out of range.
    """

    data: str = option("uoft-cs/cifar10", "A folder of images, a parquet file, or a hub name")
    out: str = option("runs/train", "The folder for state, log, samples and the trained model")
    images: int = option(20_000_000, "Train on this many images in total", LENGTH)
    batch_size: int = option(512, "Images a step, over all processes", LENGTH)
    lr: float = option(1e-3, "Peak learning rate of Adam", LENGTH)
    schedule: str = option("cosine", "Decay after the warm-up: cosine, linear or constant", LENGTH)
    warmup: int = option(200_000, "Images over which the learning rate rises", LENGTH)
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    grad_clip: float = option(1.0, "Largest norm of the gradients", LENGTH)
    loss: str = option(
        "edm", "edm, eps, x0, v, flow, min_snr or p2: weight and distribution of noise", LENGTH
    )
    ema: int = option(500_000, "Half-life of the average, in images", LENGTH)
    ema_warmup: float = 0.05
    nsr_mean: float = -1.2
    nsr_std: float = 1.2
    sigma_data: float = 0.5
    label_dropout: float = option(0.1, "Probability of training without the label", LENGTH)
    flip: bool = option(True, "Mirror half of the images", LENGTH, shown="flip")
    seed: int = option(0, "Seed of everything random", LENGTH)
    split: str = "train"
    size: int | None = None
    init: str | None = option(
        None,
        "Begin with the weights and the network of a bundled model or a file (not on --resume)",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1", MACHINE)
    precision: str = option("auto", "bf16, float32, or auto: bf16 on a GPU", MACHINE)
    compile: bool | None = option(None, "torch.compile", MACHINE, shown="on a GPU")
    graphs: bool | None = option(None, "A step as one CUDA graph", MACHINE, shown="on a GPU")
    max_seconds: float | None = option(
        None, "Save and stop after this long; go on with --resume", MACHINE
    )
    save_seconds: float = option(600.0, "Save the state this often", MACHINE)
    sample_images: int = option(
        2_000_000, "Write a grid of samples every so many images; 0 is only at the end", MACHINE
    )
    snapshot_images: int = option(
        0, "Store averages for 'sdeflow ema' every so many images; 0 is never", MACHINE
    )
    snapshot_stds: tuple[float, ...] = (0.05, 0.10)
    log_steps: int = option(100, "Write a line to the log every so many steps", MACHINE)
    model: UNetConfig = field(default_factory=UNetConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "snapshot_stds", tuple(self.snapshot_stds))  # JSON has lists
        for name in ("images", "batch_size", "log_steps", "ema", "ema_warmup", "lr", "grad_clip"):
            positive_number(f"TrainConfig: {name}", getattr(self, name))
        one_of("TrainConfig: schedule", self.schedule, ("cosine", "linear", "constant"))
        one_of("TrainConfig: loss", self.loss, ("edm", *LOSSES))
        one_of("TrainConfig: precision", self.precision, ("auto", "bf16", "float32"))

    @property
    def steps(self) -> int:
        """How many steps the whole training has."""
        return math.ceil(self.images / self.batch_size)

    @property
    def objective(self) -> Loss:
        """The loss that the network is trained with."""
        null = self.model.num_classes or None
        if self.loss != "edm":
            chosen = LOSSES[self.loss]
            return chosen if null is None else LabelDropout(chosen, null, self.label_dropout)
        return EDMLoss(self.nsr_mean, self.nsr_std, self.sigma_data, self.label_dropout, null)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        seen = (step + 0.5) * self.batch_size
        rise = min(1.0, seen / self.warmup) if self.warmup else 1.0
        rest = min(1.0, max(0.0, seen - self.warmup) / max(1, self.images - self.warmup))
        fall = {
            "cosine": 0.5 + 0.5 * math.cos(math.pi * rest),
            "linear": 1 - rest,
            "constant": 1.0,
        }[self.schedule]
        return self.lr * rise * fall

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; `from_dict` reads it back."""
        return asdict(self) | {"model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration that `to_dict` wrote."""
        return cls(**dict(values) | {"model": UNetConfig.from_dict(values["model"])})
