"""Language models around any mechanism."""

from regard.models.language.decoder import Decoder, DecoderBlock, ShortConvolution
from regard.models.language.ranker import RankerBlock, ResponseRanker

__all__ = ["Decoder", "DecoderBlock", "RankerBlock", "ResponseRanker", "ShortConvolution"]
