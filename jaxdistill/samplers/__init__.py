"""Where responses come from: the policy itself, the data's own references, the teacher, or a mixture."""

from jaxdistill.samplers.base import OriginsConfig, RolloutConfig, Sampler, render_prompt
from jaxdistill.samplers.local import Generated, LocalSampler, generate
from jaxdistill.samplers.mixture import MixedSampler, Schedule
from jaxdistill.samplers.reference import ReferenceSampler
from jaxdistill.samplers.teacher import TeacherSampler

__all__ = [
    "Generated",
    "LocalSampler",
    "MixedSampler",
    "OriginsConfig",
    "ReferenceSampler",
    "RolloutConfig",
    "Sampler",
    "Schedule",
    "TeacherSampler",
    "generate",
    "render_prompt",
]
