"""Runs the published implementations of `cases.py` and stores where they end:
`python tests/parity/make.py`.

It needs the packages at the versions of `pins.toml`; `pip install --no-deps` them, lest they bring
another torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from cases import SAME  # noqa: E402
from deviations import RUNS  # noqa: E402
from published import installed  # noqa: E402
from published_grids import GRIDS  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from setting import PINS, RECORDS  # noqa: E402


def main() -> None:
    missing = [
        f"{name}=={version}" for name, version in PINS["packages"].items() if not installed(name)
    ]
    if missing:
        raise SystemExit(
            f"install {' '.join(missing)} with pip install --no-deps, and run this again"
        )
    tensors, calls = {}, {}
    for case in SAME:
        for key, steps, native in case.runs():
            times, x, asked = case.run(steps, native)
            if not bool(torch.isfinite(x).all()):
                raise SystemExit(f"{key}: the peer returns {x}")
            tensors[key], calls[key] = x.contiguous(), asked
            if native:
                tensors[f"{key}/times"] = times.contiguous()
    for key, (_, run) in {**RUNS, **GRIDS}.items():
        tensors[key] = run().contiguous()
    save_file(
        tensors, RECORDS, {"calls": json.dumps(calls), "packages": json.dumps(PINS["packages"])}
    )
    print(f"{len(calls)} runs of {len(SAME)} settings, {RECORDS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
