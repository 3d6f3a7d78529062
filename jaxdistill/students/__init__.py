"""The student: one decoder for every supported family, and its weights in Hugging Face format."""

from jaxdistill.students.architecture import DecoderConfig
from jaxdistill.students.decoder import Cache, Decoder, Remat
from jaxdistill.students.families import parse_config, read_config
from jaxdistill.students.fused_attention import AttentionChoice, choose_attention
from jaxdistill.students.loading import abstract_decoder, check_folder, load_decoder
from jaxdistill.students.lora import LoraConfig, merge, save_adapters, trained_and_frozen
from jaxdistill.students.saving import StoredDtype, save_decoder, save_params

__all__ = [
    "AttentionChoice",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "LoraConfig",
    "Remat",
    "StoredDtype",
    "abstract_decoder",
    "check_folder",
    "choose_attention",
    "load_decoder",
    "merge",
    "parse_config",
    "read_config",
    "save_adapters",
    "save_decoder",
    "save_params",
    "trained_and_frozen",
]
