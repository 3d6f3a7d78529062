"""transformers' generate, for sampler.py: run by a Python that has torch.

`sampler_torch.py MODEL DTYPE PROMPTS PROMPT_TOKENS NEW_TOKENS` loads the model, then answers every line on
its input with one JSON line: CPU and wall seconds of one call.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main(model: str, dtype: str, prompts: int, prompt_tokens: int, new_tokens: int) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    decoder.generation_config.eos_token_id = None
    ids = torch.randint(0, decoder.config.vocab_size, (prompts, prompt_tokens))
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            out = decoder.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        assert out.shape == (prompts, prompt_tokens + new_tokens)
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - begin}
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
