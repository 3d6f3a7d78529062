"""The student: one decoder for every supported family, and its weights in Hugging Face format."""

from jaxdistill.students.decoder import Cache, Decoder
from jaxdistill.students.families import DecoderConfig, read_config
from jaxdistill.students.weights import load_decoder, save_decoder

__all__ = ["Cache", "Decoder", "DecoderConfig", "load_decoder", "read_config", "save_decoder"]
