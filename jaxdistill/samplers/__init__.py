"""Where responses come from: the policy itself, the data's own references, or a mixture of them."""

from jaxdistill.samplers.base import OriginsConfig, RolloutConfig, Sampler, render_prompt
from jaxdistill.samplers.local import Generated, LocalSampler, generate
from jaxdistill.samplers.mixture import MixedSampler, Schedule
from jaxdistill.samplers.reference import ReferenceSampler

__all__ = [
    "Generated",
    "LocalSampler",
    "MixedSampler",
    "OriginsConfig",
    "ReferenceSampler",
    "RolloutConfig",
    "Sampler",
    "Schedule",
    "generate",
    "render_prompt",
]
