"""Mechanisms broken on purpose, by theme. `BROKEN` lists them with the checks that must catch them."""

from broken import arguments, boundaries, numbers, shipped, states, travel
from broken.declaring import BROKEN, Broken

__all__ = ["BROKEN", "Broken", "arguments", "boundaries", "numbers", "shipped", "states", "travel"]
