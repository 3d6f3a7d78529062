"""What a device's memory should be, by formula, and the models it is checked with.

Nothing of it is fitted: every term is an array that the computation must hold at its fullest moment, and the
copies of it that XLA's CPU backend makes. In float32; letters as in `memory.py`.
"""

from jaxdistill.students import DecoderConfig

FLOAT = 4
GIB = 2**30
