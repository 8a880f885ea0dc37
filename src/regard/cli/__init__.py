"""Floor 5: the command line. It asks the floors below and prints what they say; it has no logic of its own."""

from regard.cli import bench, browse, compare, inspect  # noqa: F401  their commands enter the app
from regard.cli.app import app, main

__all__ = ["app", "main"]
