"""Every objective, some with several settings, for the vocabularies of `batches`."""

from jaxdistill.losses.alm import ALM, ALMConfig
from jaxdistill.losses.end_of_turn import EndOfTurn, EndOfTurnConfig
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.gold import GOLD, GOLDConfig
from jaxdistill.losses.minillm import MiniLLM, MiniLLMConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.losses.sum import Sum, SumConfig, TermConfig
from jaxdistill.losses.uld import ULD, ULDConfig
from jaxdistill.losses.xtoken import XToken, XTokenConfig
from tests.unit.losses.batches import TEACHER_VOCAB

# Student tokens 0 to 17 are the teacher's own, 18 begins with its token 3, 19 has none.
FIRST = (*range(18), 3, -1)

SUM = SumConfig(
    terms=(
        TermConfig(objective=GKDConfig(), weight=0.5),
        TermConfig(objective=ALMConfig(temperature=5.0), rows=("student",)),
        TermConfig(objective=SFTConfig(), rows=("reference", "teacher"), name="warm"),
    )
)
CASES = {
    **{
        credit: ReverseKL(ReverseKLConfig(credit=credit))
        for credit in ("lookahead", "broadcast", "uniform", "proportional", "projected")
    },
    "reward": ReverseKL(ReverseKLConfig(credit="projected", reward_coefficient=0.5)),
    "batch baseline": ReverseKL(ReverseKLConfig(credit="lookahead", baseline="batch", normalize=False)),
    "no baseline": ReverseKL(ReverseKLConfig(credit="lookahead", baseline="none")),
    "sft": SFT(SFTConfig()),
    **{f"gkd {beta}": GKD(GKDConfig(beta=beta, temperature=1 + beta)) for beta in (0.0, 0.5, 1.0)},
    "minillm": MiniLLM(MiniLLMConfig(credit="projected", discount=0.9)),
    "minillm sampled": MiniLLM(MiniLLMConfig(credit="projected", single_step=False, baseline="none")),
    "minillm chunk": MiniLLM(MiniLLMConfig(credit="chunk", normalize=True)),
    "uld": ULD(ULDConfig()),
    "gold": GOLD(GOLDConfig(unmatched_weight=0.5)),
    "alm": ALM(ALMConfig(temperature=5.0)),
    "alm reverse": ALM(ALMConfig(beta=1.0)),
    "xtoken": XToken(XTokenConfig(), FIRST, TEACHER_VOCAB),
    "end forward": EndOfTurn(EndOfTurnConfig(), 7),
    "end reverse": EndOfTurn(EndOfTurnConfig(beta=1.0), 7),
    "sum": Sum(SUM, (GKD(GKDConfig()), ALM(ALMConfig(temperature=5.0)), SFT(SFTConfig()))),
}
