"""Pictures by the ten thousand."""

from sdeflow.generate.run import Generated, generate

__all__ = ["Generated", "generate"]
