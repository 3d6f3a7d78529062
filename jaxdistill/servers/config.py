"""What a server's section of a config says of where it is and how it is asked. Times in seconds."""

import os
import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from jaxdistill.config import StrictConfig
from jaxdistill.errors import ConfigError
from jaxdistill.servers.peer import Peer


class RequestSettings(StrictConfig):
    """How patiently and how hard a server is asked."""

    max_concurrency: int = Field(default=8, ge=1, description="requests in flight at once, all endpoints")
    request_timeout_s: float = Field(
        default=120.0, gt=0, description="deadline of one request, its reply included"
    )
    batch_budget_s: float = Field(
        default=900.0, gt=0, description="time for a whole batch, retries included; then the server is gone"
    )
    start_timeout_s: float = Field(
        default=60.0, gt=0, description="time for the server's first answer when a run starts"
    )
    attempts: int = Field(
        default=5, ge=1, description="tries of a request that the server itself answers with status 500"
    )
    backoff_s: float = Field(
        default=0.5, ge=0, description="longest wait after the first failure; doubles each time"
    )
    backoff_max_s: float = Field(
        default=20.0, ge=0, description="longest random wait; Retry-After comes on top"
    )
    breaker_failures: int = Field(
        default=5, ge=1, description="failures in a row after which an endpoint is left alone"
    )
    breaker_probe_s: float = Field(
        default=5.0,
        gt=0,
        description="time between the single requests that find out if it is back; grows while others work",
    )
    hedge_share: float = Field(
        default=0.05, ge=0, lt=1, description="share of requests sent a second time when they lag; 0: never"
    )


class EndpointSettings(StrictConfig):
    """A server that runs already, and its replicas. `api_key_env` is the NAME of an environment variable."""

    endpoint: str | tuple[str, ...] = Field(description="URL of the server, or a list of replicas")
    api_key_env: str | None = Field(
        default=None, description="name of the environment variable with the API key"
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoint or endpoints, as a list without trailing slashes."""
        listed = (self.endpoint,) if isinstance(self.endpoint, str) else self.endpoint
        return tuple(url.rstrip("/") for url in listed)

    @field_validator("api_key_env")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        # What stands here by mistake may be the key itself: it is not repeated.
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("the NAME of an environment variable is expected here, not the key")
        return value

    @field_validator("endpoint")
    @classmethod
    def _urls(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        listed = (value,) if isinstance(value, str) else value
        if not listed:
            raise ValueError("the URL of the server, or a list of them, is expected")
        for url in listed:
            _check_url(url)
            if url.rstrip("/").endswith("/v1"):
                raise ValueError(f"{url}: SGLang is asked in its own protocol; give the address without /v1")
        if len({url.rstrip("/") for url in listed}) < len(listed):
            raise ValueError("one URL is listed twice")
        return value


def api_key(peer: Peer, name: str | None) -> tuple[str | None, str]:
    """The key in environment variable `name` (None: none), and where it came from for messages. Raises
    `ConfigError` where the variable is not set."""
    if name is None:
        return None, ""
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"{peer.name}.api_key_env names the environment variable {name}, which is not set; "
            f"export the {peer.name}'s API key in it"
        )
    return key, f"check the API key in the environment variable {name}"


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        sound = parts.port != 0 and parts.hostname and not any(sign.isspace() for sign in url)
    except ValueError:  # a port that is no number, or none there can be
        sound = False
    if parts.scheme not in ("http", "https") or not sound:
        raise ValueError("a URL such as http://host:30000 is expected")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds credentials; put the key in a variable and name it in api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("the URL has a query or fragment; only scheme, host, port and path are expected")
