"""Run by test_hosts.py in the place of python: one process of a run whose teacher is gone for process 1 at
the third batch it scores, and for nobody else."""

import os
import runpy
import sys

from jaxdistill.errors import TeacherUnavailable
from jaxdistill.teachers import Teachers

genuine, calls = Teachers.score, 0


def score(self, rollouts):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("JAXDISTILL_PROCESS") == "1":
        raise TeacherUnavailable("the teacher's machine is gone")
    return genuine(self, rollouts)


Teachers.score = score
module, sys.argv = sys.argv[2], sys.argv[2:]  # python -m MODULE ...
runpy.run_module(module, run_name="__main__", alter_sys=True)
