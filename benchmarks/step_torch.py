"""torch's training step of a transformers model, for step.py: run by a Python that has both.

`step_torch.py MODEL ROWS LENGTH RATE DECAY CLIP` loads the model in float32, then takes one step for every
line on its input, always on the same tokens, and answers with one JSON line: CPU and wall seconds, the loss
before the step and the gradient's norm before it is clipped.
"""

import json
import math
import os
import sys
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


def main(model: str, rows: int, length: int, rate: float, decay: float, clip: float) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    vocabulary = decoder.config.vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (rows, length)))
    # Norms are not decayed: the only parameters of one axis.
    parameters = list(decoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        logits = decoder(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        pause, cpu_pause = time.perf_counter(), time.process_time()
        # Not the norm that clipping goes by: torch adds up its squares one by one in float32, which for the
        # embedding's 28 M numbers is off by a thousandth.
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        begin += time.perf_counter() - pause
        cpu += time.process_time() - cpu_pause
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - begin}
        print(json.dumps(seconds | {"loss": loss.item(), "grad_norm": norm}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *map(float, sys.argv[4:]))
