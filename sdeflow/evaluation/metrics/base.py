"""What a metric is: a name, what it needs, its value, its bias and its warnings.

A metric is one file here and one entry in `sdeflow.evaluation.metrics.METRICS`. It is given what an
extractor saw of the two sets, and does not know what images are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from sdeflow._utils.distributed import Rank
from sdeflow.evaluation.metrics.statistics import Statistics

ENOUGH = 50_000
"""How many images a score is usually taken over; below it, results say how far off they are."""

Better = Literal["smaller", "larger"]


class Seen(Protocol):
    """What an extractor saw of a set: `FeatureStatistics`, or anything with these three."""

    statistics: Statistics
    features: Tensor | None
    facts: dict[str, Any]


class Value(NamedTuple):
    """A metric's value, and its standard error where it has one."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Context:
    """How metrics are computed: neighbours of precision and recall, and the processes."""

    k: int = 3
    rank: Rank = field(default_factory=Rank)


@dataclass(frozen=True)
class Metric(ABC):
    """A score of samples against a reference.

    `score` names the extractor by its Frechet distance ("fid", "fd_cifar", "fd_in"); None takes
    that of the first distance that is asked for. `better` says which way is better.
    `needs_features` asks that the features are kept, `needs_labels` that labels are known.
    """

    name: str
    score: str | None = None
    better: Better = "smaller"
    needs_features: bool = False
    needs_labels: bool = False

    @abstractmethod
    def value(self, real: Seen, fake: Seen, context: Context) -> Value:
        """The value of `fake` against `real`. Errors: `ValueError` where it has none."""

    def bias(self, real: Seen, fake: Seen) -> float | None:
        """About what two sets of one distribution score; None where that is not known or zero."""
        return None

    def warnings(self, real: Seen, fake: Seen) -> list[str]:
        """Why the value should not be compared with others."""
        return []

    def check(self, real: int | None, fake: int | None, context: Context) -> None:  # noqa: B027
        """Raise `ValueError` where so many images are too few; None is a number not known yet."""


def features_of(seen: Seen) -> Tensor:
    """The features that were kept. Errors: `ValueError` where they were not."""
    if seen.features is None:
        raise ValueError("this metric needs the features themselves, and only statistics are there")
    return seen.features
