r"""Images per second of networks and of whole sampling loops on one GPU, ours and peers', in one
run.

Forward: median time over repeats of one call in inference, at several batch sizes. Ours is compiled
(torch.compile, for each batch size) and replayed as a CUDA graph; peers run as their users run
them, eagerly in half precision, and EDM's compiled as well. Loop: 35 calls of Heun on EDM's grid,
from noise to pictures: our plan captured whole with the compiled network, against EDM's sampler
written by hand (float64 state) over the eager network, against diffusers' DDIM pipeline, and
against 35 bare replays of our compiled network. Training: forward, backward and optimiser, bf16
autocast; ours compiled and as one CUDA graph, as `sdeflow train` runs it, EDM's eagerly.

    python -m benchmarks.speed.throughput [--batches 1 16 64 512] \
        [--parts forward loops training] [--out benchmarks/results/throughput]

PyTorch keeps what it compiled: runs for one network and batch each, side by side beforehand, make
this one short.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import table, write
from benchmarks.speed.networks import Diffusers, EDMNetwork
from sdeflow import Heun, grid
from sdeflow.denoisers import Preconditioned
from sdeflow.images.datasets import prepared as prepared_pixels
from sdeflow.losses import EDMLoss
from sdeflow.models.checkpoint import load
from sdeflow.models.unet import UNet, UNetConfig
from sdeflow.sampling.capture import CapturedSolve
from sdeflow.training.cuda_graph import GraphedStep

LARGE = UNetConfig(
    channels=256, multipliers=(1, 1, 1), blocks=4, attention=(16,), embedding=512, num_classes=10
)
"""Ours at the scale of EDM's DDPM++: 61.7 M parameters, 44.2 GFLOP an image (theirs 55.7 M and
42.4).
"""

TITLES = {
    "large": "sdeflow, large",
    "bundled": "sdeflow, bundled",
    "edm": "EDM DDPM++",
    "diffusers": "diffusers UNet2DModel",
}


def median_ms(run: Callable[[], object], repeats: int = 12) -> float:
    """The median time of a call on the device, in milliseconds."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def flops(network: nn.Module) -> float:
    """Floating-point operations of a forward for one image, two a multiply-add."""
    weight = next(network.parameters())
    x = torch.zeros(1, 3, 32, 32, device=weight.device, dtype=weight.dtype)
    with FlopCounterMode(display=False) as counter:
        network(x, torch.full((1,), 0.3, device=weight.device), _labels(network, 1))
    return float(counter.get_total_flops())


def _labels(network: nn.Module, batch: int) -> Tensor | None:
    return torch.arange(batch, device="cuda") % 10 if isinstance(network, UNet) else None


def prepared(kind: str) -> nn.Module:
    """A network on the device, in its half precision, with random weights where it has no trained
    ones.
    """
    torch.manual_seed(0)
    if kind == "bundled":
        network: nn.Module = load("cifar10").network  # type: ignore[assignment]
    else:
        network = {"large": lambda: UNet(LARGE), "edm": EDMNetwork, "diffusers": Diffusers}[kind]()
    if kind == "large":  # its last layers begin at zero, and zeros flatter a matrix product
        for p in network.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
    half = (
        torch.float16 if kind in ("edm", "diffusers") else torch.bfloat16
    )  # as their users run them
    return network.to("cuda", half).eval().requires_grad_(False)


class Forward:
    """A network at a batch size, ready to be called: eagerly, or compiled and captured."""

    def __init__(
        self, network: nn.Module, batch: int, compiled: Callable[..., Tensor] | None = None
    ):
        weight = next(network.parameters())
        x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=weight.dtype)
        if isinstance(network, UNet):
            x = x.contiguous(memory_format=torch.channels_last)
        time_, label = torch.full((1,), 0.3, device="cuda").expand(batch), _labels(network, batch)
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if compiled is None:
            self.run: Callable[[], object] = lambda: network(x, time_, label)
            self.run()
        else:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    compiled(x, time_, label)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.output = compiled(x, time_, label)
            self.run, self._held = graph.replay, (graph, x, time_, label)
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - began
        self.gigabytes = torch.cuda.max_memory_allocated() / 2**30


def by_hand(network: nn.Module, x: Tensor, steps: int = 18) -> Tensor:
    """EDM's sampler as it is published: Heun over sigma, float64 state, the network in half
    precision; `2 steps - 1` calls.
    """
    dtype = next(network.parameters()).dtype
    i = torch.arange(steps, dtype=torch.float64, device=x.device)
    sigmas = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = torch.cat([sigmas, torch.zeros_like(sigmas[:1])])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        scale, noise = 1 / (0.25 + sigma**2).sqrt(), sigma.log() / 4
        inner = network(
            (scale * x).to(dtype), noise.flatten().expand(len(x)), _labels(network, len(x))
        )
        return (skip * x + out * inner.float()).double()

    x = x.double() * sigmas[0]
    for i, (a, b) in enumerate(pairwise(sigmas)):
        slope = (x - denoise(x, a)) / a
        x_next = x + (b - a) * slope
        if i < steps - 1:
            x_next = x + (b - a) * (0.5 * slope + 0.5 * (x_next - denoise(x_next, b)) / b)
        x = x_next
    return x


def forward_rows(
    batches: list[int], names: list[str], ready: dict[str, Any], timed: bool
) -> tuple[list[list[Any]], dict[str, Any]]:
    rows, found = [], {}
    for name in names:
        try:
            network = prepared(name)
        except (
            ImportError,
            RuntimeError,
        ) as error:  # a peer that is not installed, or not with what is
            print(f"{name} is left out: {str(error).splitlines()[-1]}", flush=True)
            continue
        work = flops(network)
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        title = TITLES[name]
        ways: list[tuple[str, Any]] = [("eager", None)]
        if name != "diffusers":
            # Compiled anew for each batch size: one graph for all sizes is slower (366 for 433
            # TFLOP/s at 512) and takes twice as long to compile.
            ways.append(("compiled, graph", torch.compile(network, fullgraph=True, dynamic=False)))
        for way, compiled in ways:
            for batch in batches if timed else []:
                call = Forward(network, batch, compiled)
                ms = median_ms(call.run)
                rate = batch / ms * 1e3
                key = f"{name}, {way}, {batch}"
                found[key] = {
                    "ms": ms,
                    "images_per_second": rate,
                    "tflops": rate * work / 1e12,
                    "gib": call.gigabytes,
                }
                rows.append(
                    [
                        *(
                            title,
                            f"{parameters:.1f} M, {work / 1e9:.1f} GFLOP",
                            way,
                            batch,
                            f"{ms:.2f}",
                            f"{rate:,.0f}",
                        ),
                        *(
                            f"{rate * work / 1e12:.0f}",
                            f"{call.gigabytes:.2f}",
                            f"{call.seconds:.0f}",
                        ),
                    ]
                )
                print(rows[-1], flush=True)
                del call
        ready[name] = (network, ways[-1][1])
        torch.cuda.empty_cache()
    return rows, found


def loop_rows(ready: dict[str, Any], batch: int = 64) -> tuple[list[list[Any]], dict[str, float]]:
    found: dict[str, float] = {}
    x = torch.randn(batch, 3, 32, 32, device="cuda")
    for name in ("large", "bundled"):
        if name not in ready:
            continue
        network, compiled = ready[name]
        found[f"{name}: eager network, EDM's loop by hand"] = median_ms(
            lambda n=network: by_hand(n, x), 5
        )
        bare = Forward(network, batch, compiled)
        found[f"{name}: 35 bare replays of the compiled network"] = median_ms(
            lambda b=bare: [b.run() for _ in range(35)], 5
        )
        denoiser = Preconditioned(compiled, shape=(3, 32, 32))
        plan = Heun("nsr").plan(denoiser.process, grid.karras(denoiser.process, 18))
        label = {"label": _labels(network, batch)}
        whole = CapturedSolve(plan, denoiser, x * 80.0, label)
        found[f"{name}: sdeflow, whole solve as one graph"] = median_ms(
            lambda w=whole: w(x * 80.0), 5
        )
        del bare, whole
    if "edm" in ready:
        network = ready["edm"][0]
        found["EDM DDPM++: eager network, EDM's loop by hand"] = median_ms(
            lambda: by_hand(network, x), 5
        )
    if "diffusers" in ready:
        from diffusers import DDIMPipeline, DDIMScheduler

        pipeline = DDIMPipeline(unet=ready["diffusers"][0].model, scheduler=DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        found["diffusers: DDIMPipeline, 35 steps"] = median_ms(
            lambda: pipeline(batch_size=batch, num_inference_steps=35, output_type="np"), 3
        )
    rows = [[key, f"{ms:.1f}", f"{batch / ms * 1e3:,.0f}"] for key, ms in found.items()]
    return rows, found


def train_rows(names: list[str], batch: int = 256) -> tuple[list[list[Any]], dict[str, Any]]:
    found = {}
    for name in names:
        network = prepared(name).float().train().requires_grad_(True)
        optimiser = torch.optim.AdamW(network.parameters(), fused=True, capturable=True)
        called = network if name == "edm" else torch.compile(network, fullgraph=True, dynamic=False)
        pixels = torch.randint(256, (batch, 3, 32, 32), device="cuda", dtype=torch.uint8)
        label = torch.arange(batch, device="cuda") % 10
        generator = torch.Generator("cuda")
        loss_of = EDMLoss(null_label=10)

        def work(
            x: Tensor, y: Tensor | None, called: Any = called, network: Any = network, optimiser: Any = optimiser,
            generator: Any = generator, loss_of: Any = loss_of,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            with torch.autocast("cuda", torch.bfloat16):
                model = Preconditioned(called)
                given = {} if y is None else {"label": y}
                x0 = prepared_pixels(x, generator)
                loss = loss_of(model, x0, generator=generator, **given).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return loss.detach(), norm

        step: Any = work if name == "edm" else GraphedStep(work, generator)
        with torch.enable_grad():
            for _ in range(3):
                step(pixels, label)
            torch.cuda.reset_peak_memory_stats()
            ms = median_ms(lambda step=step, x=pixels, y=label: step(x, y))
        found[name] = {
            "images_per_second": batch / ms * 1e3,
            "gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        del step, optimiser, network, called
        torch.cuda.empty_cache()
    return [
        [TITLES[k], f"{v['images_per_second']:,.0f}", f"{v['gib']:.1f}"] for k, v in found.items()
    ], found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 512])
    parser.add_argument("--networks", nargs="+", default=["large", "bundled", "edm", "diffusers"])
    parser.add_argument("--parts", nargs="+", default=["forward", "loops", "training"])
    parser.add_argument("--out", default=None, help="where to write the results, .json and .md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("throughput is measured on a GPU, and torch sees none here")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = (
        64  # of one `forward`, whatever the network: sizes and networks are many here
    )
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    ceiling = 2 * 8192**3 / median_ms(lambda: square @ square) / 1e9
    results: dict[str, Any] = {"ceiling_tflops": ceiling}

    def save(markdown: str) -> None:
        write("throughput", results, markdown, options.out)

    ready: dict[str, Any] = {}
    rows, results["forward"] = forward_rows(
        options.batches, options.networks, ready, "forward" in options.parts
    )
    head = [
        "network",
        "size",
        "way",
        "batch",
        "ms",
        "images/s",
        "TFLOP/s",
        "peak GiB",
        "first call, s",
    ]
    text = f"A bf16 matrix product reaches {ceiling:.0f} TFLOP/s here.\n\n" + table(head, rows)
    save(text)
    if "loops" in options.parts:
        loops, results["loops"] = loop_rows(ready)
        text += (
            "\n\n35 calls of Heun (DDIM's pipeline: 35 steps), 64 pictures from noise:\n\n"
            + table(["loop", "ms", "images/s"], loops)
        )
        save(text)
    if "training" in options.parts:
        ready.clear()
        trained, results["training"] = train_rows(
            [name for name in options.networks if name != "diffusers"]
        )
        text += "\n\nTraining, batch 256, bf16 autocast:\n\n" + table(
            ["network", "images/s", "peak GiB"], trained
        )
        save(text)


if __name__ == "__main__":
    main()
