"""How often a classifier names a sample by the label that it was made for."""

from __future__ import annotations

from dataclasses import dataclass

from sdeflow.evaluation.metrics.base import Better, Context, Metric, Seen, Value


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of samples that the extractor's classifier names by their label."""

    better: Better = "larger"
    needs_labels: bool = True

    def value(self, real: Seen, fake: Seen, context: Context) -> Value:
        if "accuracy" not in fake.facts:
            raise ValueError(
                "accuracy compares the network's classes with labels, and those of"
                f" {fake.facts['source']} are unknown or of other classes; leave that metric out"
            )
        return Value(float(fake.facts["accuracy"]))

    def warnings(self, real: Seen, fake: Seen) -> list[str]:
        known = fake.facts.get("class_names")
        classes = fake.facts.get("source_classes")
        if classes and known and list(classes) != list(known):
            return [
                f"the samples' classes ({', '.join(classes)}) are not those of the network:"
                " accuracy may mean nothing"
            ]
        return []
