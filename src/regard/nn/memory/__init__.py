"""Memory: what was seen is written into a state that is more than a sum."""
