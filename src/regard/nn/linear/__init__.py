"""Attention in linear time: keys and values are summed up before a query looks at them."""
