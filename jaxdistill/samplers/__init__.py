"""Where responses come from: the policy itself, or the data's own reference responses."""

from jaxdistill.samplers.base import RolloutConfig, Sampler, render_prompt
from jaxdistill.samplers.local import Generated, LocalSampler, generate
from jaxdistill.samplers.reference import ReferenceSampler

__all__ = [
    "Generated",
    "LocalSampler",
    "ReferenceSampler",
    "RolloutConfig",
    "Sampler",
    "generate",
    "render_prompt",
]
