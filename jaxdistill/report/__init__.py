"""report.html: a run folder as one page that opens without a network."""

from jaxdistill.report.build import write_report

__all__ = ["write_report"]
