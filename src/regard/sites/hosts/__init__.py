"""One module per host: how its attention modules are told apart and routed through the door."""
