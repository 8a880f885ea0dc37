"""Language models around any causal mechanism."""

from regard.models.language.decoder import Decoder, DecoderBlock, ShortConvolution

__all__ = ["Decoder", "DecoderBlock", "ShortConvolution"]
