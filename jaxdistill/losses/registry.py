"""The objectives that stand alone, each of which can be a term of a `sum`. Adding one is one file, and its
lines here."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from jaxdistill.losses.alm import ALM, ALMConfig
from jaxdistill.losses.base import Objective
from jaxdistill.losses.end_of_turn import EndOfTurn, EndOfTurnConfig
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.gold import GOLD, GOLDConfig
from jaxdistill.losses.minillm import MiniLLM, MiniLLMConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.losses.uld import ULD, ULDConfig
from jaxdistill.losses.xtoken import XToken, XTokenConfig

SINGLE: Mapping[str, type[Objective[Any]]] = {
    "alm": ALM,
    "end_of_turn": EndOfTurn,
    "gkd": GKD,
    "gold": GOLD,
    "minillm": MiniLLM,
    "reverse_kl": ReverseKL,
    "sft": SFT,
    "uld": ULD,
    "xtoken": XToken,
}
SingleConfig = Annotated[
    ALMConfig
    | EndOfTurnConfig
    | GKDConfig
    | GOLDConfig
    | MiniLLMConfig
    | ReverseKLConfig
    | SFTConfig
    | ULDConfig
    | XTokenConfig,
    Field(discriminator="kind"),
]
