"""regard: every attention mechanism through one interface, each one proved by one suite.

>>> import regard
>>> layer = regard.create("gqa", dim=256, heads=8, kv_heads=2, causal=True)
"""

from importlib.metadata import version

from regard import ops
from regard.catalogue import Contract, OptionSet, Paper, card, create, mechanisms, register

__version__ = version("regard")

__all__ = ["Contract", "OptionSet", "Paper", "__version__", "card", "create", "mechanisms", "ops", "register"]
