"""Models of sets, and of images as sets of objects."""

from regard.models.sets.object_discovery import Discovered, ObjectDiscovery
from regard.models.sets.set_transformer import SetTransformer

__all__ = ["Discovered", "ObjectDiscovery", "SetTransformer"]
