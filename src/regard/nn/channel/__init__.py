"""Gates over the channels of feature maps."""
