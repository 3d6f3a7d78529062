"""Who answers: the canary, the served tokenizer, and the longest row a server reads.

A server can be restarted with another model, or a balancer can put one behind an address, at any time of a
long run. So a short text of ours, the canary, is scored at the start and again with every request: its
values belong to one model, and each reply carries its own proof of who made it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import Unscored
from jaxdistill.servers import Peer
from jaxdistill.teachers.checks import Asked, ScoringRow, scoring_request
from jaxdistill.teachers.replies import read_reply
from jaxdistill.text import Tokenizer
from jaxdistill.text.files import read_files

# Changing a word here makes every run that is resumed find "another teacher".
CANARY = (
    "Seven grey herons stood in the shallow river while the miller's daughter counted them aloud: "
    "3 + 4 = 7, und dann flogen sie fort. def count(birds): return len(birds)"
)
CANARY_TOKENS = 32
# A tokenizer that is not the served model's differs within its first thousand ids, which every model has;
# an id that the served model lacks would kill it, so the rest is asked for only after these are right.
COMMON_IDS = 1000
PROBED_WORDS, PROBED_CONTROLS = 48, 64  # ids of each sort in one request


@dataclass(frozen=True)
class TeacherIdentity:
    """What a run remembers of its teacher, and finds again when it is resumed.

    `tokenizer` is the fingerprint of the configured tokenizer; `tokenizer_checked` is false where it
    was not compared with the server's. `longest` is the longest row it reads, in tokens. `canary` holds the
    canary's log-probabilities.
    """

    name: str
    model: str
    model_type: str
    weight_version: str
    tokenizer: str
    tokenizer_checked: bool
    longest: int
    canary_ids: tuple[int, ...]
    canary: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "TeacherIdentity":
        """The identity that `to_json` wrote. Raises `KeyError` with the name of a field that is missing, and
        `TypeError` for one of another version."""
        known = {field.name: written[field.name] for field in fields(cls)}
        lists = {key: tuple(known[key]) for key in ("canary_ids", "canary")}
        return cls(**{**written, **lists})

    def difference(self, now: "TeacherIdentity", tolerance: float) -> str | None:
        """How `now` is another teacher than this one, in words; None where it is the same.

        A model's path may change (a moved folder), its tokenizer, weight version and canary may not:
        the canary's by `tolerance` nats a token at most.
        """
        if self.tokenizer != now.tokenizer:
            return f"tokenizer {now.tokenizer[:12]}, expected {self.tokenizer[:12]}"
        if self.canary_ids != now.canary_ids:
            return "other canary ids, so its values cannot be compared"
        if self.weight_version != now.weight_version:
            return f"weight_version {now.weight_version!r}, expected {self.weight_version!r}"
        apart = canary_distance(self.canary, now.canary)
        if apart > tolerance:
            return f"canary log-probabilities {apart:.3g} nats a token apart, expected at most {tolerance:g}"
        return None


def canary_row(tokenizer: Tokenizer, longest: int) -> ScoringRow:
    """The canary in the teacher's tokens, as plain content: all but the first of them are scored."""
    ids = tokenizer.encode(CANARY).ids[: min(CANARY_TOKENS, longest)]
    if len(ids) < 2:
        raise ConfigError(
            f"{tokenizer.where}: the canary has {len(ids)} tokens within the {longest} that the teacher "
            "reads, expected at least 2; check teacher.tokenizer and teacher.context_length"
        )
    return ScoringRow(None, ids[:1], ids[1:])


def canary_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two canaries' values, in nats a token."""
    return float(np.abs(np.subtract(one, other)).mean())


def longest_row(peer: Peer, models: Any, info: Any, endpoint: str) -> int:
    """The longest row a server reads, from its `/v1/models` and, where it has one, its `/server_info`.

    A row of the whole context is refused (the server counts one token to come), and the scheduler's own
    limit is lower still; so is that of a small cache.
    """
    data = models.get("data") if isinstance(models, dict) else None
    first = data[0] if isinstance(data, list) and data else None
    context = first.get("max_model_len") if isinstance(first, dict) else None
    if type(context) is not int or context < 2:
        raise peer.contract(
            f"{peer.at(endpoint)}: /v1/models answered {models!r:.200}, expected data[0].max_model_len; "
            "check that the address is an SGLang server's"
        )
    most = info.get("max_req_input_len") if isinstance(info, dict) else None
    return min(context, most if type(most) is int and most > 1 else context) - 1


def check_tokenizer(
    post: Callable[[Mapping[str, Any]], Any], tokenizer: Tokenizer, longest: int, where: str
) -> bool:
    """Compare the configured tokenizer with the served model's by what single ids stand for.

    `post` sends a `/generate` body and returns the decoded reply. Returns false where nothing is compared
    (see `base.tokenizer_doubt`): the server keeps no tokenizer, or there are not two ids to ask it for.
    Raises `ConfigError` for another tokenizer, and `TeacherContractError` where the server refuses the ids:
    its vocabulary is smaller.
    """
    words, controls, end = _known_texts(tokenizer)
    compared = False
    for low, high in ((0, min(COMMON_IDS, end)), (COMMON_IDS, end)):
        picked = _spread([i for i in controls if low <= i < high], PROBED_CONTROLS)
        picked += _spread([i for i in words if low <= i < high], PROBED_WORDS)
        ids = picked[:longest]
        if len(ids) < 2:
            continue
        expected = [controls.get(i) or words[i] for i in ids]
        texts = _served_texts(post, ids, tokenizer.vocab_size, where)
        if all(text is None for text in texts):
            continue  # the other ids are asked for all the same: a smaller vocabulary refuses them
        wrong = [
            f"id {i} is {text!r:.60} there and {meant!r:.60} here"
            for i, text, meant in zip(ids, texts, expected, strict=True)
            if not _same(text, meant)
        ]
        if wrong:
            raise ConfigError(
                f"teacher.tokenizer ({tokenizer.where}) is not that of the model served at {where}: of "
                f"{len(ids)} ids {len(wrong)} stand for other texts ({'; '.join(wrong[:3])}); set "
                "teacher.tokenizer to the served model's own (where it is left out, the student's is taken)"
            )
        compared = True
    return compared


def _known_texts(tokenizer: Tokenizer) -> tuple[dict[int, str], dict[int, str], int]:
    """Ids that stand for a whole word, ids that steer the model, and where the ids to ask for end.

    Marks and white space are left out: some decoders tidy the space around them.
    """
    files = read_files(tokenizer.where)
    inner = files.model.get("text_config") or {}
    # Some tokenizers have ids beyond the model's own vocabulary, for parts that this model lacks; and of its
    # last id servers say what id 0 stands for (see `replies`).
    size = int(files.model.get("vocab_size") or inner.get("vocab_size") or tokenizer.vocab_size) - 1
    controls = {
        entry["id"]: entry["content"]
        for entry in files.document.get("added_tokens") or []
        if entry["id"] in tokenizer.control
    }
    words: dict[int, str] = {}
    for index, data in enumerate(tokenizer.token_bytes(range(min(size, tokenizer.vocab_size)))):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue  # part of a character: decoded alone it is a replacement mark
        if text.removeprefix(" ").isalnum():
            words[index] = text
    return words, controls, size


def _spread(ids: list[int], count: int) -> list[int]:
    """At most `count` of the ids, evenly spread, with the first and the last."""
    places = np.linspace(0, len(ids) - 1, min(count, len(ids)))
    return [ids[int(place)] for place in places]


def _served_texts(
    post: Callable[[Mapping[str, Any]], Any], ids: list[int], vocab_size: int, where: str
) -> list[str | None]:
    """What the server says each id stands for; None where it does not say."""
    array = np.array(ids, np.int32)
    row = ScoringRow(None, array[:1], array[1:])
    # Servers compare chosen ids with their vocabulary and refuse, where an input id would end them.
    asked = Asked(end_token=max(ids))
    try:
        reply = post({**scoring_request([row], asked), "return_text_in_logprobs": True})
    except TeacherContractError as error:
        raise TeacherContractError(
            f"{error}; it was asked about ids up to {max(ids)}, check that teacher.tokenizer is the served "
            "model's own (where it is left out, the student's is taken)"
        ) from error
    (read,) = read_reply(reply, [row], asked, vocab_size)
    if isinstance(read, Unscored):
        raise TeacherContractError(f"teacher at {where}: asked for the texts of ids: {read.detail}")
    return [text for _, _, text in reply[0]["meta_info"]["input_token_logprobs"]]


def _same(served: str | None, meant: str) -> bool:
    """Whether both are one text; a decoder may leave out the space before a word that stands alone."""
    return served in (meant, meant.removeprefix(" "))
