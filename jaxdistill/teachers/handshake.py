"""Meeting a served teacher: every endpoint is asked what it serves, and all must be one model."""

import logging
from collections.abc import Sequence
from typing import Any

from jaxdistill.errors import JaxDistillError, TeacherContractError
from jaxdistill.records import Unscored
from jaxdistill.servers import TEACHER, Peer, Transport
from jaxdistill.teachers.checks import Asked, scoring_request
from jaxdistill.teachers.config import ServedSettings
from jaxdistill.teachers.identity import TeacherIdentity, canary_row, check_tokenizer, longest_row
from jaxdistill.teachers.replies import read_reply
from jaxdistill.text import Tokenizer

logger = logging.getLogger(__name__)

# Newer and older servers.
MODEL_INFO = ("/model_info", "/get_model_info")
SERVER_INFO = ("/server_info", "/get_server_info")


def meet(
    transport: Transport, tokenizer: Tokenizer, settings: ServedSettings, asked: Asked
) -> TeacherIdentity:
    """Who answers: is each endpoint reachable and the key right, how long a row may be, is the tokenizer the
    served model's, and do all of them give the canary the same values.

    One that does not answer is left to the breaker while another does: when it comes back, the canary in its
    replies tells whether it is the same model.

    Raises `TeacherUnavailable`, `TeacherContractError`, or `ConfigError` for another tokenizer.
    """
    lengths = longest_rows(TEACHER, transport)
    endpoints, longest = list(lengths), min(lengths.values())
    if settings.context_length is not None:
        longest = min(longest, settings.context_length)
    found = [_identify(transport, tokenizer, settings, asked, endpoint, longest) for endpoint in endpoints]
    for endpoint, other in zip(endpoints[1:], found[1:], strict=True):
        difference = found[0].difference(other, settings.canary_tolerance)
        if difference:
            raise TeacherContractError(
                f"teacher at {endpoint}: got {difference}, as at {endpoints[0]}; the endpoints of one "
                "teacher must serve the same model"
            )
    return found[0]


def longest_rows(peer: Peer, transport: Transport) -> dict[str, int]:
    """The longest row that each endpoint reads, of those that answer; the others are warned of. Raises the
    peer's `unavailable` where none does."""
    lengths: dict[str, int] = {}
    silent: list[JaxDistillError] = []
    for endpoint in transport.endpoints:
        try:
            models = transport.get("/v1/models", endpoint=endpoint).body
            info = _info(peer, transport, SERVER_INFO, endpoint, needed=False)
            lengths[endpoint] = longest_row(peer, models, info, endpoint)
        except peer.unavailable as error:
            silent.append(error)
    if not lengths:
        raise silent[0]
    for error in silent:
        logger.warning("%s (the run starts with the other endpoints)", error)
    return lengths


def _identify(
    transport: Transport,
    tokenizer: Tokenizer,
    settings: ServedSettings,
    asked: Asked,
    endpoint: str,
    longest: int,
) -> TeacherIdentity:
    def post(body: Any) -> Any:
        return transport.post("/generate", body, endpoint=endpoint).body

    info = _info(TEACHER, transport, MODEL_INFO, endpoint, needed=True)
    same = check_tokenizer(post, tokenizer, longest, endpoint)
    canary = canary_row(tokenizer, longest)
    (read,) = read_reply(post(scoring_request([canary], asked)), [canary], asked, tokenizer.vocab_size)
    if isinstance(read, Unscored):
        raise TeacherContractError(f"teacher at {endpoint}: {read.detail}; its replies cannot be used")
    return TeacherIdentity(
        name=settings.name,
        model=str(info.get("model_path", "")),
        model_type=str(info.get("model_type", "")),
        weight_version=read.weight_version,
        tokenizer=tokenizer.fingerprint,
        tokenizer_checked=same,
        longest=longest,
        canary_ids=(*canary.prompt.tolist(), *canary.response.tolist()),
        canary=tuple(read.logprobs.tolist()),
    )


def _info(
    peer: Peer, transport: Transport, paths: Sequence[str], endpoint: str, *, needed: bool
) -> dict[str, Any]:
    """The first object that one of the paths answers; without one, empty where it is not needed."""
    refused: JaxDistillError | None = None
    for path in paths:
        try:
            info = transport.get(path, endpoint=endpoint).body
        except peer.contract as error:
            refused = refused or error
            continue
        if isinstance(info, dict):
            return info
        refused = refused or peer.contract(
            f"{peer.at(endpoint)}: {path} answered {info!r:.80}, expected an object; check that the "
            "address is an SGLang server's"
        )
    if needed and refused is not None:
        raise refused
    return {}
