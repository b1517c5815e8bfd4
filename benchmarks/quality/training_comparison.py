r"""Quality after an equal time of training on one GPU: our network and EDM's DDPM++ of the same
size, in the same loop.

Both are trained by `sdeflow.training.Trainer` on the same images in the same order: bf16 autocast,
torch.compile, the step as one CUDA graph, AdamW at EDM's rate and batch, EDM's loss, flips, label
dropout, the average of weights. Only the network differs:

- `ours`: sdeflow's UNet, 128 channels on each of three levels, three blocks a level, 13.65 M
  parameters;
- `edm`: DDPM++ as EDM computes it, with 64 channels for 128, 13.96 M parameters, EDM's initial
  weights and class condition;
- `edm_fused`: the same function as `edm`, by the kernels that our network has (channels last,
  compiled normalisation, fused attention), which tells the shape of the network from the way it is
  computed. It may be left out.

None has dropout: 860 s are some 9 million images, 180 passes over CIFAR-10; EDM's 0.13 keeps a
network from learning 50,000 images by heart in 4,000 passes (200 million), and would cost both
quality here.

The limit counts seconds of training steps, from batch to average, while the device works on them.
Not counted, for any: decoding the images; compiling, choosing kernels and recording the step, which
happen on steps that are undone; saving; drawing. The learning rate is a function of the share of
the time that is used: it rises over the first `--warmup` of it and ends at zero with the limit,
however many images the network has seen by then.

    python -m benchmarks.quality.training_comparison --data train.parquet \
        --network ours --seconds 860 --out runs/compare
    python -m benchmarks.quality.training_comparison --data train.parquet \
        --network edm --seconds 860 --out runs/compare
    python -m benchmarks.quality.training_comparison --data train.parquet \
        --test test.parquet --network ours --out runs/compare --evaluate
    python -m benchmarks.quality.training_comparison --data train.parquet \
        --test test.parquet --network edm --out runs/compare --evaluate
    python -m benchmarks.quality.training_comparison --out runs/compare --report

The same command goes on from the folder's state, so `--max-seconds`, which ends an invocation in
wall-clock time, cuts a training into several. Side by side, one process a GPU
(CUDA_VISIBLE_DEVICES), they share a `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.quality.nfe_fid import JUDGES, Scorer
from benchmarks.report import provenance, table, write
from benchmarks.speed.networks import EDMNetwork
from sdeflow._utils.distributed import Rank
from sdeflow._utils.files import check_writable, write_atomically
from sdeflow._utils.run_control import Log, Stop, attempted, machine
from sdeflow.denoisers import Preconditioned
from sdeflow.errors import CheckpointError, NonFiniteError
from sdeflow.images.datasets import Images, Stream, load_images, prepared
from sdeflow.models.unet import UNet, UNetConfig
from sdeflow.training.api import LOG, STATE, fit_to_data
from sdeflow.training.config import TrainConfig
from sdeflow.training.cuda_graph import WARM
from sdeflow.training.trainer import Trainer, read_state

CHANNELS = {"ours": 128, "edm": 64, "edm_fused": 64}
TITLES = {"ours": "sdeflow UNet", "edm": "EDM DDPM++", "edm_fused": "EDM DDPM++, by our kernels"}
RESULT = "result.json"
CLASSES = 10
OWN = ("out", "data", "model", "save_seconds", "log_steps")
"""Settings that may differ between trainings that are compared, or that say nothing here."""

WAYS = ("machine", "torch", "precision", "compiled", "graph")
"""What an invocation says of how it trained; all of those that are compared must say the same."""


@dataclass(frozen=True)
class Entry:
    """One network's training: which network, for how many seconds, under which schedule; stored in
    the training's state.
    """

    network: str
    channels: int
    size: int
    num_classes: int
    seconds: float
    warmup: float
    lr: float

    def __post_init__(self) -> None:
        if self.network not in CHANNELS:
            raise ValueError(f"the networks are {', '.join(CHANNELS)}; got {self.network!r}")
        if self.seconds <= 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                "seconds must be positive and warmup a share from 0 to below 1; got"
                f" {self.seconds}, {self.warmup}"
            )

    def build(self) -> nn.Module:
        """The network with its first weights."""
        c = self.channels
        if self.network != "ours":
            return EDMNetwork(
                c, num_classes=self.num_classes, dropout=0.0, fused=self.network == "edm_fused"
            )
        return UNet(
            UNetConfig(
                size=self.size, num_classes=self.num_classes, channels=c, multipliers=(1, 1, 1), blocks=3, attention=(16,),
                embedding=3 * c, head_channels=min(64, c), group_size=min(16, c),
            )
        )  # fmt: skip

    def rate(self, seconds: float) -> float:
        """The learning rate of a step that begins after `seconds` of training; never quite zero."""
        done = seconds / self.seconds
        rise = min(1.0, done / self.warmup) if self.warmup else 1.0
        rest = min(1.0, max(0.0, done - self.warmup) / (1 - self.warmup))
        return self.lr * max(1e-6, rise * (0.5 + 0.5 * math.cos(math.pi * rest)))


class TimedTrainer(Trainer):
    """A `Trainer` of any network whose learning rate follows the seconds that its steps have taken.

    `clock` tells seconds. On a GPU it is read when the step before the last one has ended there, so
    that the device always has the next step in its queue; `begin` and `end` wait for all of it.
    """

    def __init__(
        self,
        config: TrainConfig,
        entry: Entry,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.entry, self.clock, self.mark = entry, clock, 0.0
        self.ended: torch.cuda.Event | None = None
        super().__init__(config, device, Rank())

    def build(self) -> Any:
        return self.entry.build()

    def advance(self, stream: Stream) -> tuple[Tensor, Tensor]:
        settings = self.config
        self.config = replace(settings, lr=self.entry.rate(self.seconds))
        try:
            result = super().advance(stream)
        finally:
            self.config = settings
        if self.device.type == "cuda":
            before, self.ended = self.ended, torch.cuda.Event()
            self.ended.record()
            if before is not None:
                before.synchronize()
        self._count()
        return result

    def _count(self) -> None:
        now = self.clock()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def begin(self) -> None:
        """Count seconds from here on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.mark = self.clock()

    def end(self) -> None:
        """Count no more, but what the device still had to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._count()

    def prepare(self, stream: Stream) -> None:
        """Compile the network and record its step, on steps that are undone."""
        kept = {name: value.clone() for name, value in self._tensors().items()}
        step, seconds = self.step, self.seconds
        for _ in range(WARM + 2 if self.device.type == "cuda" else 1):
            self.advance(stream)
        with torch.no_grad():
            for name, value in self._tensors().items():
                value.copy_(kept[name])
            for state in self.optimizer.state.values():
                state["step"].fill_(step)
        self.step, self.seconds = step, seconds

    def go_on(self, path: Path) -> None:
        """Take over the state in `path`. Raises `CheckpointError` unless it is of this very
        training.
        """
        entry_of(path, read_state(path)[1], self.entry)
        self.load(path)


def entry_of(path: Path, facts: dict[str, Any], own: Entry | None = None) -> Entry:
    """The entry of a stored training, which must be `own` if that is given."""
    try:
        entry = Entry(**facts["runs"][-1]["entry"])
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a training of this benchmark; name another folder with --out"
        ) from error
    if own is not None and entry != own:
        odd = [name for name, value in asdict(own).items() if getattr(entry, name) != value]
        raise CheckpointError(
            f"{path} was trained with"
            f" {', '.join(f'{name}={getattr(entry, name)}' for name in odd)}, and now"
            f" {', '.join(f'{name}={getattr(own, name)}' for name in odd)} is asked: leave that as"
            " it was, or choose another --out"
        )
    return entry


def folder_of(arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / arguments.network


# ----------------------------------------------------------------------------------------- training


def train(arguments: argparse.Namespace) -> TimedTrainer:
    """Train one network, or go on with it, until the limit or the invocation's end."""
    stop = Stop(arguments.max_seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, path = device.type == "cuda", folder_of(arguments) / STATE
    check_writable(path, "training state")
    with (
        stop.listening(),
        torch.random.fork_rng(devices=[device] if gpu else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=gpu, allow_tf32=True),
    ):
        images = load_images(arguments.data)
        if images.num_classes != CLASSES:
            raise SystemExit(
                f"{arguments.data} has {images.num_classes} classes; the comparison draws {CLASSES}"
                " in turn"
            )
        config = fit_to_data(settings(arguments), images)
        channels = arguments.channels or CHANNELS[arguments.network]
        entry = Entry(
            arguments.network,
            channels,
            images.size,
            images.num_classes,
            arguments.seconds,
            arguments.warmup,
            arguments.lr,
        )
        trainer = TimedTrainer(config, entry, device)
        if path.exists():
            trainer.go_on(path)
        if trainer.seconds < entry.seconds:
            run(trainer, images, stop)
    done = trainer.seconds >= entry.seconds
    print(
        f"{arguments.network}: {trainer.images:,} images in {trainer.seconds:.2f} of"
        f" {entry.seconds:g} s, {trainer.images / max(trainer.seconds, 1e-9):,.0f} a second"
        + ("" if done else f"; stopped ({stop.reason}): the same command goes on")
    )
    return trainer


def settings(arguments: argparse.Namespace) -> TrainConfig:
    """The loop's settings; its own schedule stays constant, since `TimedTrainer` sets the rate of
    each step.
    """
    return TrainConfig(
        data=str(arguments.data), out=str(folder_of(arguments)), images=10**12, batch_size=arguments.batch_size, lr=arguments.lr,
        schedule="constant", warmup=0, seed=arguments.seed, sample_images=0, save_seconds=arguments.save_seconds,
        log_steps=arguments.log_steps,
    )  # fmt: skip


def run(trainer: TimedTrainer, images: Images, stop: Stop) -> None:
    """The steps of one invocation; at its end the state is saved."""
    config, entry, out = trainer.config, trainer.entry, Path(trainer.config.out)
    stream = Stream(images, config.batch_size, config.seed, Rank(), trainer.device)
    log = Log(out / LOG, trainer.step)
    began = time.monotonic()
    trainer.prepare(stream)
    gpu = trainer.device.type == "cuda"
    session: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "from": trainer.images, "to": trainer.images, "seconds": 0.0,
        "machine": machine(trainer.device, 1), "torch": torch.__version__, "precision": trainer.precision,
        "compiled": trainer.forward is not trainer.network, "graph": gpu and config.graphs is not False,
        "preparation_seconds": round(time.monotonic() - began, 1), "entry": asdict(entry),
    }  # fmt: skip
    trainer.runs.append(session)
    before, saved = trainer.seconds, time.monotonic()
    window, mark = torch.zeros(2, device=trainer.device), (trainer.step, trainer.seconds)

    def save() -> None:
        trainer.end()
        session["to"], session["seconds"] = trainer.images, round(trainer.seconds - before, 3)
        try:
            trainer.save(out / STATE)
        finally:
            trainer.begin()

    bar = tqdm(
        total=round(entry.seconds, 1),
        initial=round(before, 1),
        unit="s",
        mininterval=5.0,
        dynamic_ncols=True,
    )
    trainer.begin()
    while trainer.seconds < entry.seconds and not stop.asked:
        window += torch.stack(trainer.advance(stream))
        if trainer.step % config.log_steps == 0:
            steps = trainer.step - mark[0]
            loss, norm = (window / steps).tolist()
            speed = steps * config.batch_size / max(trainer.seconds - mark[1], 1e-9)
            window, mark = torch.zeros_like(window), (trainer.step, trainer.seconds)
            if not math.isfinite(loss + norm):
                raise NonFiniteError(
                    f"the loss is {loss}, the gradients' norm {norm} by step {trainer.step}"
                )
            bar.set_postfix(loss=f"{loss:.4f}", img_s=f"{speed:.0f}", refresh=False)
            bar.update(round(min(trainer.seconds, entry.seconds) - bar.n, 1))
            log.write(
                {
                    "step": trainer.step, "images": trainer.images, "loss": round(loss, 6), "grad_norm": round(norm, 5),
                    "images_per_second": round(speed, 1), "lr": entry.rate(trainer.seconds),
                    "seconds": round(trainer.seconds, 3),
                }
            )  # fmt: skip
        if 0 < config.save_seconds <= time.monotonic() - saved:
            with attempted("save the state, and train on"):
                save()
            saved = time.monotonic()
    bar.close()
    save()


# --------------------------------------------------------------------------------------- evaluation


def averaged(path: Path, device: torch.device) -> tuple[nn.Module, Entry, dict[str, Any]]:
    """The averaged network of a training's state in float32, its entry, and the facts of the
    state.
    """
    tensors, facts = read_state(path)
    entry = entry_of(path, facts)
    network = entry.build()
    weights = {
        name.removeprefix("ema."): value
        for name, value in tensors.items()
        if name.startswith("ema.")
    }
    network.load_state_dict(weights)
    return network.to(device).eval().requires_grad_(False), entry, facts


@torch.no_grad()
def loss_of(
    network: nn.Module, config: TrainConfig, images: Images, device: torch.device, bf16: bool
) -> float:
    """The training loss over all of `images`, each once, with its label and unflipped; the noise is
    the same for all networks.
    """
    loss = replace(config.objective, label_dropout=0.0)
    generator = torch.Generator(device).manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for indices in torch.arange(images.count).split(config.batch_size):
        x0, label = prepared(images.get(indices).to(device)), images.labels[indices].to(device)  # type: ignore[index]
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            model = Preconditioned(network, config.sigma_data)
            total += loss(model, x0, generator=generator, label=label).double().sum()
    return float(total) / images.count


def gflop(network: nn.Module, size: int) -> float:
    """Billions of floating-point operations of a forward for one image, two a multiply-add,
    attention included.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 3, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample the averaged network, measure them, and write the result beside the
    state.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, folder = device.type == "cuda", folder_of(arguments)
    cpu, entry, facts = averaged(folder / STATE, torch.device("cpu"))
    config = TrainConfig.from_dict(facts["config"])
    parameters, work = sum(p.numel() for p in cpu.parameters()), gflop(cpu, entry.size)
    network = cpu.to(device)
    losses = {
        split: loss_of(network, config, load_images(source, split=split), device, gpu)
        for split, source in (("train", arguments.data), ("test", arguments.test))
    }
    network.to(torch.bfloat16 if gpu else torch.float32)
    if gpu:
        network.compile(dynamic=False)
    scorer = Scorer(
        argparse.Namespace(
            features=arguments.features, data=arguments.data, test=arguments.test, n=arguments.n
        ),
        device,
    )
    model = Preconditioned(network, config.sigma_data, shape=(3, entry.size, entry.size))
    batch = min(arguments.batch_size, arguments.n)
    found, seconds = scorer(model, ("heun", "karras", arguments.nfe, arguments.n), batch)  # type: ignore[arg-type]
    distances = scorer.distances(found)
    result = {
        "network": entry.network, "parameters": parameters, "gflop": round(work, 3), "finished": facts["seconds"] >= entry.seconds,
        "seconds": facts["seconds"], "steps": facts["step"], "images": facts["step"] * config.batch_size,
        "ema_loss_train": losses["train"], "ema_loss_test": losses["test"],
        **distances, "test_set": scorer.test_set, "floor": scorer.test_set["fd_cifar"],
        "drawing_seconds": round(seconds, 1),
        "same": {
            "limit": entry.seconds, "warmup": entry.warmup, **{key: sorted({run[key] for run in facts["runs"]}) for key in WAYS},
            "settings": {key: value for key, value in facts["config"].items() if key not in OWN},
            "data": arguments.note, "pictures": arguments.n, "nfe": arguments.nfe, "drawn_in": "bf16" if gpu else "float32",
            "features": {e.score: e.describe() for e in scorer.extractors},
        },
        "entry": asdict(entry), "runs": facts["runs"], "evaluation": provenance(),
    }  # fmt: skip
    write_atomically(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode(), "result")
    values = ", ".join(
        f"{JUDGES[k]} {v:.4g} (test set {scorer.test_set[k]:.4g})" for k, v in distances.items()
    )
    print(f"{entry.network}: {values}, {arguments.n} images")
    return result


# ------------------------------------------------------------------------------------------- report


def results(out: Path) -> list[dict[str, Any]]:
    """The results of all networks. Ends the program unless both sides are there, finished and
    comparable.
    """
    found = []
    for name in CHANNELS:
        path = out / name / RESULT
        if path.is_file():
            found.append(json.loads(path.read_text()))
        elif name != "edm_fused":
            raise SystemExit(
                f"there is no {path}: train {name} and then measure it, with --network {name}"
                " --evaluate"
            )
    for one in found:
        if not one["finished"]:
            limit = one["same"]["limit"]
            raise SystemExit(
                f"{one['network']} has {one['seconds']:.1f} of {limit:g} s: train it to the end,"
                " and evaluate again"
            )
        if odd := [key for key, value in one["same"].items() if value != found[0]["same"][key]]:
            values = "; ".join(
                f"{key}: {found[0]['same'][key]} and {one['same'][key]}" for key in odd
            )
            raise SystemExit(
                f"{found[0]['network']} and {one['network']} are not comparable ({values})"
            )
    return found


def report(arguments: argparse.Namespace) -> None:
    """One table of all networks, and how its figures were made."""
    found = results(Path(arguments.out))
    same = found[0]["same"]
    judges = [k for k in JUDGES if all(k in one for one in found)]
    head = [
        "network", "parameters", "GFLOP an image", "seconds of training", "images/s", "images seen", "loss, training set",
        "loss, test set", *(f"{JUDGES[k]}{of}" for k in judges for of in ("", ", test set")),
    ]  # fmt: skip
    rows = [
        [
            TITLES[one["network"]], f"{one['parameters'] / 1e6:.2f} M", f"{one['gflop']:.1f}", f"{one['seconds']:.1f}",
            f"{one['images'] / one['seconds']:,.0f}", f"{one['images']:,}", f"{one['ema_loss_train']:.4f}",
            f"{one['ema_loss_test']:.4f}", *(f"{value:.4g}" for k in judges for value in (one[k], one["test_set"][k])),
        ]
        for one in found
    ]  # fmt: skip
    about = " ".join(
        f"{TITLES[one['network']]}: evaluated {one['evaluation']['date']}, trained from"
        f" {one['runs'][0]['started']} in {len(one['runs'])}"
        f" invocation{'s' if len(one['runs']) > 1 else ''}."
        for one in found
    )
    parts = [
        table(head, rows),
        how(same),
        *[f"Data: {same['data']}."] * bool(same["data"]),
        f"On {' and '.join(same['machine'])}, torch {' and '.join(same['torch'])}. {about}",
        "Written by",
    ]
    write("training_comparison", {"networks": found}, "\n\n".join(parts), arguments.into)


def how(same: dict[str, Any]) -> str:
    """What the figures mean, from what was stored with them."""
    s, bf16 = same["settings"], "bf16" in same["precision"]
    ways = ["bf16 autocast" if bf16 else "float32", *["torch.compile"] * all(same["compiled"])]
    ways += ["each step one CUDA graph"] * all(same["graph"])
    return (
        f"Each network was trained for {same['limit']:g} s on one device by the same loop,"
        f" sdeflow's, on the same images in the same order: {', '.join(ways)}, batch"
        f" {s['batch_size']}, AdamW with a learning rate that rises to {s['lr']:g} in the first"
        f" {100 * same['warmup']:g} % of the time and falls by a cosine to zero at its end, EDM's"
        f" loss, {'flips' if s['flip'] else 'no flips'}, label dropout {s['label_dropout']:g}, no"
        f" dropout of activations, an average of weights with a half-life of {s['ema']:,} images,"
        f" seed {s['seed']}. Seconds are those of training steps, from batch to average; decoding,"
        " compiling, recording the step, saving and drawing are not counted, for any. FD-CIFAR is"
        f" the Frechet distance of {same['pictures']:,} images to the training set in the"
        f" features of sdeflow's classifier, FD-IN that in those of an ImageNet network; neither is FID."
        " Seeds are 0 to {same['pictures'] - 1}, classes in"
        f" turn, Heun on Karras's grid, NFE {same['nfe']}, {same['drawn_in']}, averaged weights;"
        " the test set has as many images, where it can. The losses are those of the averaged weights, each"
        " image once, with the same noise for all. One training each: how much of a difference is"
        " chance, the table does not say."
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="the folder of all trainings; each network has its own in it"
    )
    parser.add_argument(
        "--data", help="the training set, parquet or a folder of images, of ten classes"
    )
    parser.add_argument("--test", help="the test set")
    parser.add_argument("--network", choices=list(CHANNELS))
    parser.add_argument(
        "--seconds", type=float, default=860.0, help="the limit, in seconds of training steps"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=None,
        help="end this invocation after so many of the clock",
    )
    parser.add_argument("--batch-size", type=int, default=512, help="of training, and of drawing")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--warmup",
        type=float,
        default=0.02,
        help="the share of the time in which the learning rate rises",
    )
    parser.add_argument(
        "--channels",
        type=int,
        default=None,
        help="another width than the network's own, for a trial",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-seconds", type=float, default=120.0)
    parser.add_argument("--log-steps", type=int, default=100)
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="draw from the network and measure, instead of training",
    )
    parser.add_argument("--n", type=int, default=50_000, help="how many images --evaluate makes")
    parser.add_argument("--nfe", type=int, default=35)
    parser.add_argument(
        "--note",
        default="",
        help="what --evaluate says of the data, such as that they are a lossy copy",
    )
    parser.add_argument(
        "--features", default=None, help="another feature network than the bundled one"
    )
    parser.add_argument(
        "--report", action="store_true", help="write the table of all that is evaluated"
    )
    parser.add_argument(
        "--into", default=None, help="another name than benchmarks/results/training_comparison"
    )
    arguments = parser.parse_args(words)
    if not arguments.report:
        needed = ("data", "network", *(("test",) if arguments.evaluate else ()))
        if missing := [f"--{name}" for name in needed if getattr(arguments, name) is None]:
            parser.error(f"missing: {', '.join(missing)}")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.report:
        report(arguments)
    elif arguments.evaluate:
        evaluate(arguments)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
