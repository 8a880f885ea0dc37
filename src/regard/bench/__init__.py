"""Floor 4: measures mechanisms side by side."""
