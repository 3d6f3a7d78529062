"""What a run records about itself: metrics, samples, progress and times."""

from jaxdistill.metrics.log import MetricsLog
from jaxdistill.metrics.rows import RowFile, read_rows, write_atomically
from jaxdistill.metrics.samples import Sample, SampleLog
from jaxdistill.metrics.stopwatch import Stopwatch
from jaxdistill.metrics.trackers import SERVICES, TensorBoard, check_installed, make_trackers

__all__ = [
    "SERVICES",
    "MetricsLog",
    "RowFile",
    "Sample",
    "SampleLog",
    "Stopwatch",
    "TensorBoard",
    "check_installed",
    "make_trackers",
    "read_rows",
    "write_atomically",
]
