"""Floor 3: models that take any mechanism by its key."""
