"""Images by the ten thousand."""

from functools import partial

from sdeflow._utils.moved import renamed
from sdeflow.generate.api import GenerationResult, generate

__all__ = ["GenerationResult", "generate"]
__getattr__ = partial(renamed, "generate")
