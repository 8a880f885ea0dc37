"""Floor 3: data that models are trained and tested on, exact or real, made or found on this machine."""
