"""The door to attention in any model: find its sites, look into them, change them, leave it as it was.

from regard import sites

print(sites.find(model).table())
with sites.attach(model, sites.Edit(sites.Where(layers=3, keys="image"), "weights", "scale", 0.5)):
    model.generate(...)
"""

from regard.sites.attach import Attached, Instrument, attach, find
from regard.sites.call import AttentionCall
from regard.sites.capture import Capture
from regard.sites.captured import Captured
from regard.sites.edit import Edit
from regard.sites.reducers import (
    BlockMeans,
    Distance,
    Entropy,
    LastRows,
    Logits,
    Map,
    Received,
    Reducer,
    Sink,
    TopK,
)
from regard.sites.site import Site, Sites, Unreached
from regard.sites.tokens import Tokens
from regard.sites.where import Where

__all__ = [
    "Attached",
    "AttentionCall",
    "BlockMeans",
    "Capture",
    "Captured",
    "Distance",
    "Edit",
    "Entropy",
    "Instrument",
    "LastRows",
    "Logits",
    "Map",
    "Received",
    "Reducer",
    "Sink",
    "Site",
    "Sites",
    "Tokens",
    "TopK",
    "Unreached",
    "Where",
    "attach",
    "find",
]
