#!/usr/bin/env bash
# Qwen3-8B learns from Qwen3.5-35B-A3B on one machine with eight H200: the teacher on GPUs 6 and 7, the student on 0 to 5.
#
#   launch/qwen3_8b_from_qwen3.5_35b_a3b_8xh200.sh [a.b=c ...]
#
# What it needs, by the paths of the config (configs/, the same name; each can be replaced as a.b=c):
#   models/Qwen3-8B, models/Qwen3.5-35B-A3B, data/prompts.parquet, data/heldout.parquet
#   .venv with jax for the GPUs:   make venv && .venv/bin/python -m pip install -c constraints.txt -e '.[cuda12]'
#   SGLang in an environment of its own (0.5.10 or newer), named as SGLANG_PYTHON=.../bin/python
# TEACHER=FOLDER, PYTHON and what launch/teacher_sglang.sh takes may be set too; PORT goes with teacher.endpoint.
#
# The teacher is started and waited for, `jaxdistill doctor` asks it what the run will ask, the run follows, and the
# teacher is stopped, whatever happens. SIGTERM and SIGINT go to the run. The exit code is its own: 75 to start the same
# command again, which goes on from the last checkpoint. Until it is through, at most 20 times:
#
#   for try in {1..20}; do launch/qwen3_8b_from_qwen3.5_35b_a3b_8xh200.sh && break; [[ $? == 75 ]] || break; done
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export GPUS=6,7 PORT=${PORT:-30000} PYTHON=${PYTHON:-.venv/bin/python}
export CONFIG=configs/qwen3_8b_from_qwen3.5_35b_a3b_8xh200.yaml
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 # of each GPU; XLA's own choice is 0.75

# shellcheck disable=SC2016 # the inner shell's variables
exec launch/teacher_sglang.sh "${TEACHER:-models/Qwen3.5-35B-A3B}" -- \
  env CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 bash -c '
    "$PYTHON" -m jaxdistill doctor --config "$CONFIG" "$@" && exec "$PYTHON" -m jaxdistill train --config "$CONFIG" "$@"
  ' run "$@"
