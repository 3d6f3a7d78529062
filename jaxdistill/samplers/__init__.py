"""Where responses come from: the policy itself, the data's own references, the teacher, or a mixture."""

from jaxdistill.samplers.base import OriginsConfig, RolloutConfig, Sampler, render_prompt
from jaxdistill.samplers.config import LocalSamplerConfig, SamplerConfig, SGLangSamplerConfig
from jaxdistill.samplers.decoding import Generated, Generator
from jaxdistill.samplers.filters import SamplingParams, filtered, sampling_params
from jaxdistill.samplers.local import LocalSampler
from jaxdistill.samplers.mixture import MixedSampler, Schedule
from jaxdistill.samplers.reference import ReferenceSampler
from jaxdistill.samplers.sglang import SGLangSampler
from jaxdistill.samplers.stops import StopStrings
from jaxdistill.samplers.teacher import TeacherSampler

__all__ = [
    "Generated",
    "Generator",
    "LocalSampler",
    "LocalSamplerConfig",
    "MixedSampler",
    "OriginsConfig",
    "ReferenceSampler",
    "RolloutConfig",
    "SGLangSampler",
    "SGLangSamplerConfig",
    "Sampler",
    "SamplerConfig",
    "SamplingParams",
    "Schedule",
    "StopStrings",
    "TeacherSampler",
    "filtered",
    "render_prompt",
    "sampling_params",
]
