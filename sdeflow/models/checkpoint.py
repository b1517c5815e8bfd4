"""Checkpoints: safetensors files that are written completely or not at all, and say what they are.

A file holds tensors, and in its header what a reader needs: a network's configuration, class names,
the facts of its training. A SHA-256 of all of it shows whether the file is damaged. Nothing in it
is executable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from sdeflow._utils.files import write_atomically
from sdeflow.denoisers import Preconditioned
from sdeflow.errors import CheckpointError, SdeflowError
from sdeflow.models.torch_compile import compile_network
from sdeflow.models.unet import UNet, UNetConfig

BUNDLED = {"cifar10": Path(__file__).parent / "checkpoints" / "cifar10.safetensors"}
"""The checkpoints in this package, by name."""

FORMAT = "sdeflow-unet-1"
HEADER = "sdeflow"
FOREIGN = (
    "load the network with its own code, and tell sdeflow what it predicts, as in"
    " Prediction(network, 'eps', process)"
)
"""What to do with the weights of another project."""


class Pretrained(Preconditioned):
    """A trained network as a denoiser.

    It knows its shape, its noise levels, its classes and where it comes from.

    `card` holds the facts of its training; `num_classes` is 0 for an unconditional network, and
    label `num_classes` otherwise means "no label".
    """

    def __init__(
        self,
        network: UNet,
        sigma_data: float = 0.5,
        nsr_range: tuple[float, float] = (0.002, 80.0),
        class_names: Sequence[str] = (),
        card: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, sigma_data, nsr_range, network.config.shape)
        self.num_classes = network.num_classes
        self.class_names = tuple(class_names)
        self.card = dict(card or {})

    def check_condition(self, condition: Mapping[str, Any]) -> None:
        """Raise for a condition that is no label, or a label that is no class.

        Labels are whole numbers from 0 to `num_classes`.
        """
        super().check_condition(condition)
        label = condition.get("label")
        # Reading a label on the GPU would wait for the device.
        if label is None or (isinstance(label, Tensor) and label.is_cuda):
            return
        labels = torch.as_tensor(label) if type(label) is int else label
        whole = isinstance(labels, Tensor) and not (
            labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1
        )
        if not whole or bool(((labels < 0) | (labels > self.num_classes)).any()):
            names = f" ({', '.join(self.class_names)})" if self.class_names else ""
            raise ValueError(
                "label is a whole number, or one a sample, from 0 to"
                f" {self.num_classes - 1}{names}, or {self.num_classes} for no label (integers of"
                f" shape [B]); got {_shown(label)}"
            )


def _shown(label: Any) -> str:
    """A label, in an error."""
    if isinstance(label, Tensor) and label.ndim != 0:
        flat = ", label.flatten() would do" if label.ndim > 1 else ""
        return f"a {label.dtype} tensor of shape {tuple(label.shape)}{flat}"
    return repr(label)


def digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """SHA-256 over `facts` and `tensors`.

    Of the tensors it takes names, dtypes, shapes and bytes, in the order of their names.
    """
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: Path | None = None,
) -> None:
    """Write `tensors` and the JSON-ready `facts` to `path`, atomically: afterwards the file is the
    old one or the new one. The old one stays as `keep`, if that is given.

    Raises `CheckpointError` if it cannot be written (a full disk, say); the old file is then
    unchanged.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: the library writes several in an arbitrary order, and the same state should make
    # the same file.
    header = {HEADER: json.dumps({**facts, "sha256": digest(plain, dict(facts))})}
    try:
        write_atomically(path, serialise(plain, header), "checkpoint", keep)
    except SdeflowError as error:
        raise CheckpointError(str(error)) from error


def read_tensors(
    path: str | os.PathLike[str], remedy: str = "fetch or train it again"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and facts that `write_tensors` wrote; raises `CheckpointError` if
    the file is missing or damaged, and then says the `remedy`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(header[HEADER]) if HEADER in header else {}
    except (SafetensorError, OSError, ValueError) as error:
        if _is_pickle(path):
            raise CheckpointError(
                f"{path} is a file of torch.save, and not one of sdeflow, which opens no pickles:"
                f" {FOREIGN}"
            ) from error
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file of sdeflow ({error}); {remedy}"
        ) from error
    stated = facts.pop("sha256", None)
    if stated is None:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one that sdeflow wrote: {FOREIGN}"
        )
    if (found := digest(tensors, facts)) != stated:
        raise CheckpointError(
            f"{path} is damaged: its content has SHA-256 {found[:12]}..., its header says"
            f" {stated[:12]}...; {remedy}"
        )
    return tensors, facts


def _is_pickle(path: Path) -> bool:
    """Whether a file looks like one of `torch.save`: a zip archive or a bare pickle."""
    try:
        with path.open("rb") as file:
            return file.read(4)[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    except OSError:
        return False


def save_model(
    path: str | os.PathLike[str],
    network: UNet,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    sigma_data: float = 0.5,
    nsr_range: tuple[float, float] = (0.002, 80.0),
    class_names: Sequence[str] = (),
    card: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `network` for inference, in half precision.

    Its own parameters are written, or `parameters` (an EMA's, say).

    Raises `CheckpointError` if a parameter is not finite in `dtype` or the file cannot be written.
    """
    source = dict(network.named_parameters()) if parameters is None else parameters
    facts = {
        "format": FORMAT,
        "config": network.config.to_dict(),
        "sigma_data": sigma_data,
        "nsr_range": list(nsr_range),
        "class_names": list(class_names),
        "card": dict(card or {}),
    }
    write_tensors(path, finite(source, dtype, path), facts)


def finite(tensors: Mapping[str, Tensor], dtype: torch.dtype, path: object) -> dict[str, Tensor]:
    """`tensors` in `dtype` on the CPU, to be saved to `path`.

    Raises `CheckpointError` if one is not finite there.
    """
    cast = {name: value.detach().to("cpu", dtype) for name, value in tensors.items()}
    if bad := [name for name, value in cast.items() if not bool(value.isfinite().all())]:
        raise CheckpointError(
            f"not saved to {path}: {', '.join(bad[:3])} would not be finite in {dtype}"
        )
    return cast


def network_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object) -> UNet:
    """The network of the configuration in `facts`, with `tensors` as parameters.

    It is in float32 and evaluation mode, without gradients. Raises `CheckpointError` if they do not
    fit.
    """
    try:
        network = UNet(UNetConfig.from_dict(facts["config"]))
        network.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit the configuration in its own header: {error}"
        ) from error
    return network.eval().requires_grad_(False)


def about(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `Pretrained` and `save_model` take beside the network, from the facts in a header."""
    kept = {name: facts[name] for name in ("sigma_data", "class_names", "card")}
    return kept | {"nsr_range": tuple(facts["nsr_range"])}


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """The denoiser in a file that `save_model` wrote, in evaluation mode, without gradients.

    `device=None` is PyTorch's default device. Raises `CheckpointError` if the file is missing,
    damaged or of another kind.
    """
    tensors, facts = read_tensors(path)
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds {facts.get('format', 'something unnamed')!r}, not a network for"
            f" inference ({FORMAT}); a training state becomes one with: sdeflow train --out FOLDER"
            " --resume --export FILE"
        )
    place = torch.get_default_device() if device is None else torch.device(device)
    network = network_of(facts, tensors, path).to(device=place, dtype=dtype)
    return Pretrained(network, **about(facts))


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    compile: bool = False,
) -> Pretrained:
    """A trained denoiser: a bundled one by name (`"cifar10"`), or one from a file.

        denoiser = sdeflow.load("cifar10", device="cuda", dtype=torch.bfloat16, compile=True)

    `compile` compiles the network with `torch.compile`, at the first call with each size of batch,
    and says so: half a minute to a minute each on a GPU, and seconds in the next process, since
    PyTorch keeps what it compiled (see `compile_network`).

    Raises `CheckpointError` if there is none of that name, or the file is missing or damaged.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in BUNDLED:
        path = BUNDLED[name_or_path]
        if not path.is_file():
            raise CheckpointError(
                f"the bundled checkpoint {name_or_path!r} is missing from this installation;"
                " install sdeflow again"
            )
    elif not path.exists():
        raise CheckpointError(
            f"no checkpoint {str(name_or_path)!r}: it is neither a bundled one"
            f" ({', '.join(sorted(BUNDLED))}) nor a file; sdeflow train writes such files"
        )
    denoiser = load_model(path, device, dtype)
    if compile:
        compile_network(denoiser.network)  # type: ignore[arg-type]
    return denoiser
