"""Images by the ten thousand."""

from sdeflow.generate.api import GenerationResult, generate

__all__ = ["GenerationResult", "generate"]
