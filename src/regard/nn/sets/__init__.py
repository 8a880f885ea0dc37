"""Sets: tokens without an order, summed up by learned vectors or divided among them."""
