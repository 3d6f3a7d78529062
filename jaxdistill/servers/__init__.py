"""HTTP to the servers of a run, whether they score or sample: `Transport` asks, patiently and with bounds."""

from jaxdistill.servers.config import EndpointSettings, RequestSettings, api_key
from jaxdistill.servers.peer import SAMPLER, TEACHER, Peer
from jaxdistill.servers.transport import Policy, Reply, Transport

__all__ = [
    "SAMPLER",
    "TEACHER",
    "EndpointSettings",
    "Peer",
    "Policy",
    "Reply",
    "RequestSettings",
    "Transport",
    "api_key",
]
