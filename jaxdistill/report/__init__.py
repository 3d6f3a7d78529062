"""report.html: a run folder as one page that opens without a network; and several runs side by side."""

from jaxdistill.report.build import write_report

__all__ = ["write_report"]
