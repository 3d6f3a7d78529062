"""The base of every configuration model."""

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A component's configuration: unknown keys are refused, values never change.

    Each room subclasses it beside the component it configures; `jaxdistill.run_config` joins them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
