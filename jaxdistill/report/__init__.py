"""report.html: a run folder as one page that opens without a network; several runs side by side; and the
model card of what came of a run."""

from jaxdistill.report.build import write_report
from jaxdistill.report.model_card import model_card

__all__ = ["model_card", "write_report"]
