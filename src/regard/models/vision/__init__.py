"""Models of images around any mechanism that takes tokens, a grid or a feature map."""

from regard.models.vision.encoder import Encoder, EncoderBlock

__all__ = ["Encoder", "EncoderBlock"]
