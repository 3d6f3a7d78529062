"""Who samples for the student: one model a kind, joined by `kind` into `SamplerConfig`. Times in seconds."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.servers import EndpointSettings, RequestSettings
from jaxdistill.students import StoredDtype


class LocalSamplerConfig(StrictConfig):
    """`sampler.kind: local`: this process samples, on the devices and with the weights it trains."""

    kind: Literal["local"] = "local"


class SGLangSamplerConfig(EndpointSettings, RequestSettings):
    """`sampler.kind: sglang`: servers of the student's model sample, which are given its weights after every
    step. They see the folder `weights` under the same path."""

    kind: Literal["sglang"] = "sglang"
    weights: Path = Field(
        description="folder for the weights on their way to the servers: storage they share, or /dev/shm on "
        "one machine; holds two versions at a time"
    )
    dtype: StoredDtype = Field(
        default="bfloat16", description="what the weights travel in; the server computes in its own --dtype"
    )
    max_concurrency: int = Field(default=256, ge=1, description="requests in flight at once, all endpoints")
    request_timeout_s: float = Field(
        default=1800.0, gt=0, description="deadline of one request, which is all samples of one prompt"
    )
    batch_budget_s: float = Field(
        default=3600.0, gt=0, description="time for a step's samples, retries included; then it is gone"
    )
    start_timeout_s: float = Field(
        default=600.0, gt=0, description="time for a server's first answer, and for it to load new weights"
    )
    hedge_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of requests sent a second time when they lag; 0: never"
    )


SamplerConfig = Annotated[LocalSamplerConfig | SGLangSamplerConfig, Field(discriminator="kind")]
