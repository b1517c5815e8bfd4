"""The result of an evaluation: scores, and all that they depend on."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from sdeflow._utils.files import write_atomically
from sdeflow._version import __version__
from sdeflow.errors import SdeflowError
from sdeflow.evaluation.metrics import METRICS

FORMAT = "sdeflow-evaluation-1"
PathLike = str | os.PathLike[str]

SAME = 0.1
"""Two values count as equal where they differ by less than this share of the larger one. Other
seeds of one solver change an excess of 10,000 images by up to 9 % (`benchmarks/results/judges.md`).
"""

BLIND, SEES = 0.25, 1.0
"""A judge sees nothing where the excess is below `BLIND` times the floor, and sees a difference
where it is above `SEES` times the floor.
"""


@dataclass
class Evaluation:
    """The scores of a set of images, and all that they depend on.

    - `metrics`: name to value; `errors`: the standard errors of those that have one.
    - `excess`: of each distance, its value less that of as many real images (the floor).
    - `n`, `reference_n`: how many images each distance is over.
    - `floor`: the same distances between the reference and other real images, and their number.
    - `samples`, `reference`: of each extractor's score, what was measured
      (`FeatureStatistics.facts`).
    - `how`: how the samples were made (seed, NFE, solver, classes, dtype, whether compiled), where
      that is known.
    - `bias`: about what a distance of 0 scores at these numbers, where features are Gaussian
      (`expected_bias`).
    - `warnings`: why a number should not be compared, or not with any other; where judges disagree.
    """

    metrics: dict[str, float]
    n: int
    reference_n: int
    samples: dict[str, Any]
    reference: dict[str, Any]
    how: dict[str, Any] = field(default_factory=dict)
    floor: dict[str, Any] | None = None
    bias: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    torch: str = str(torch.__version__)
    machine: str = ""
    date: str = ""
    excess: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; `seed`, `nfe`, `solver` and `classes` also on top, null where
        they are unknown.
        """
        known = {key: self.how.get(key) for key in ("seed", "nfe", "solver", "classes")}
        return {"format": FORMAT, **asdict(self), **known}

    def save(self, path: PathLike) -> Path:
        """Write it as JSON, whole or not at all. Errors: `SdeflowError` if it cannot be written."""
        return write_atomically(
            path, (json.dumps(self.to_dict(), indent=1) + "\n").encode(), "result"
        )

    @classmethod
    def load(cls, path: PathLike) -> Evaluation:
        """What `save` wrote. Errors: `SdeflowError` if the file is missing or is no such result."""
        try:
            values = json.loads(Path(path).read_text())
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            optional = {f.name for f in fields(cls) if f.default_factory is not MISSING}
            names = [f.name for f in fields(cls) if f.name in values or f.name not in optional]
            return cls(**{name: values[name] for name in names})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SdeflowError(f"{path} is not a result of sdeflow evaluate ({error})") from error

    def against(self, other: Evaluation) -> dict[str, str]:
        """Of each distance that both have: "better", "worse" or "equal" than `other`.

        The excess is compared where both have it, the value otherwise; closer than `SAME` is equal.
        Errors: `ValueError` where the two differ in the number of images, the reference or an
        extractor, so that no comparison means anything.
        """
        common = [
            name
            for name in self.metrics
            if name in other.metrics and name in METRICS and name in self.bias
        ]
        for what, mine, theirs in (
            ("numbers of samples", self.n, other.n),
            ("numbers of reference images", self.reference_n, other.reference_n),
            *(
                (f"{key} for {title(name)}", _of(self, name, key), _of(other, name, key))
                for name in common
                for key in ("references", "extractors")
            ),
        ):
            if mine != theirs:
                raise ValueError(f"the two results have different {what}: {mine} and {theirs}")
        if not common:
            raise ValueError("the two results have no distance in common")
        verdicts = {}
        for name in common:
            both = name in self.excess and name in other.excess
            mine, theirs = ((r.excess if both else r.metrics)[name] for r in (self, other))
            near = abs(mine - theirs) <= SAME * max(abs(mine), abs(theirs))
            verdicts[name] = "equal" if near else "better" if mine < theirs else "worse"
        return verdicts

    def __str__(self) -> str:
        lines = []
        for name, value in self.metrics.items():
            notes = []
            if name in self.excess:
                notes.append(f"excess over as many real images {self.excess[name]:.4g}")
            if self.floor and name in self.floor["metrics"]:
                below = self.floor["metrics"][name]
                notes.append(f"floor {below:.4g}, of {self.floor['n']} real images")
            if name in self.bias:
                notes.append(f"about {self.bias[name]:.2g} of it is the bias of finite numbers")
            if name in self.errors:
                notes.append(f"standard error {self.errors[name]:.2g}")
            text = f"  ({'; '.join(notes)})" if notes else ""
            lines.append(f"{title(name):<10} {value:.4f}{text}")
        first = next(iter(self.reference.values()))
        lines.append(f"{'n':<10} {self.n} against {self.reference_n} of {first['source']}")
        if self.how.get("compiled", "no") != "no":
            lines.append(f"{'compiled':<10} {self.how['compiled']}")
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def title(name: str) -> str:
    """A metric's name as it is printed: distances in capitals."""
    distance = name.startswith(("f", "k"))
    return name.upper().replace("_", "-") if distance else name


def disagreement(excess: dict[str, float], floor: dict[str, float]) -> str | None:
    """A sentence where one judge sees nothing wrong with samples and another does, else None.

    `excess` and `floor` hold Frechet distances by name; see `BLIND` and `SEES`.
    """
    shares = {name: value / floor[name] for name, value in excess.items() if floor.get(name)}
    blind = [name for name, share in shares.items() if share < BLIND]
    sees = [name for name, share in shares.items() if share > SEES]
    if not blind or not sees:
        return None
    return (
        f"the judges disagree: {', '.join(map(title, sees))} tells the samples from real images,"
        f" and {', '.join(map(title, blind))} does not. Each is blind to some faults (docs: what"
        " each score sees); look at the images, and do not rest a claim on one of the two"
    )


def _of(result: Evaluation, name: str, key: str) -> str:
    """The hash of the reference's images, or of the extractor's weights."""
    facts = result.reference.get(METRICS[name].score or "", {})
    if key == "extractors":
        return str(facts.get("extractor", {}).get("sha256"))[:12]
    return str(facts.get("images_sha256", facts.get("pictures_sha256")))[:12]
