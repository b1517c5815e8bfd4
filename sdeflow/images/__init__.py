"""Sets of images: read, written, labelled, and shown side by side."""

from sdeflow.images.render import grid, read_facts, save_gif, save_png, to_uint8

__all__ = ["grid", "read_facts", "save_gif", "save_png", "to_uint8"]
