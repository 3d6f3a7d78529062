"""Two tokenisations of one response side by side, and the teacher's scores carried across."""

from jaxdistill.align.picture import to_svg
from jaxdistill.align.project import project
from jaxdistill.align.spans import align
from jaxdistill.align.view import AlignmentRow, alignment_rows, to_text

__all__ = ["AlignmentRow", "align", "alignment_rows", "project", "to_svg", "to_text"]
