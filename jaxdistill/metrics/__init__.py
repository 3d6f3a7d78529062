"""What a run records about itself: metrics, samples, progress, and compilations."""

from jaxdistill.metrics.compiles import CompileCounter
from jaxdistill.metrics.log import MetricsLog
from jaxdistill.metrics.rows import RowFile, read_rows, write_atomically
from jaxdistill.metrics.samples import Sample, SampleLog
from jaxdistill.metrics.stopwatch import Stopwatch

__all__ = [
    "CompileCounter",
    "MetricsLog",
    "RowFile",
    "Sample",
    "SampleLog",
    "Stopwatch",
    "read_rows",
    "write_atomically",
]
