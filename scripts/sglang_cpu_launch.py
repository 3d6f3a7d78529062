"""Starts SGLang's own server on a machine without a GPU; `scripts/sglang_cpu.py` runs this file with the
server's environment.

The wheel of torchvision that SGLang imports is built for CUDA and does not load beside the CPU build of
torch: the operators it looks for on import are declared here first. The processes the server spawns import
this file as their main module, so the declarations hold there too.

What serves adapters asks for pinned memory, which is for copies to a GPU and which torch refuses where there
is none: here it gets memory as any other.
"""

import runpy
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]


def _not_pinned(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, pin_memory=False, **named: make(*arguments, **named)


for name in ("tensor", "empty", "zeros"):
    setattr(torch, name, _not_pinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *_: self

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # kept: it takes its operators along
for operator in ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
