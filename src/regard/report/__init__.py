"""Floor 4: explains what was measured."""
