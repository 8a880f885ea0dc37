"""Language models around any mechanism."""

from regard.models.language.decoder import Decoder, DecoderBlock, LanguageModel, ShortConvolution
from regard.models.language.hyena import HYENADNA_SIZES, HyenaBlock, HyenaDNA
from regard.models.language.masked import MaskedLanguageHead, mask_tokens
from regard.models.language.ranker import RankerBlock, ResponseRanker
from regard.models.language.sensitivity import SourceSensitivity, source_sensitivity
from regard.models.language.transnormer import SIZES, SimpleGLU, TransNormerBlock, TransNormerLM

__all__ = [
    "HYENADNA_SIZES",
    "SIZES",
    "Decoder",
    "DecoderBlock",
    "HyenaBlock",
    "HyenaDNA",
    "LanguageModel",
    "MaskedLanguageHead",
    "RankerBlock",
    "ResponseRanker",
    "ShortConvolution",
    "SimpleGLU",
    "SourceSensitivity",
    "TransNormerBlock",
    "TransNormerLM",
    "mask_tokens",
    "source_sensitivity",
]
