#!/usr/bin/env bash
# `launch/local.sh N ARGUMENTS...`: `jaxdistill train ARGUMENTS...` as N processes of one run on this machine.
#
# DEVICES_PER_PROCESS=K gives each process K devices: K virtual ones on a CPU, its own K of the machine's GPUs.
# PYTHON is the interpreter (default: .venv/bin/python where there is one, else python3).
# SIGTERM and SIGINT go to all. The exit code is the first that is not 0; the others then have GRACE seconds
# (default 660) to end by themselves: more than run.barrier_timeout_s, at which they name who is missing.
set -euo pipefail
set -m # each process has a group of its own: Ctrl-C reaches it once, from here

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: [DEVICES_PER_PROCESS=K] launch/local.sh N --config FILE [a.b=c ...]" >&2
  exit 2
fi
count=$1
shift
[[ $1 == -- ]] && shift
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAXDISTILL_COORDINATOR=127.0.0.1:$port JAXDISTILL_PROCESSES=$count

if [[ -n ${DEVICES_PER_PROCESS:-} ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
fi

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

for ((index = 0; index < count; index++)); do
  own=("JAXDISTILL_PROCESS=$index")
  if [[ -n ${DEVICES_PER_PROCESS:-} ]]; then
    first=$((index * DEVICES_PER_PROCESS))
    own+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + DEVICES_PER_PROCESS - 1)))")
  fi
  env "${own[@]}" "$python" -m jaxdistill train "$@" &
  pids+=($!)
done

alive() { kill -0 "$1" 2>/dev/null; }
code=0
deadline=
left=$count
while ((left)); do
  for index in "${!pids[@]}"; do
    pid=${pids[$index]}
    if alive "$pid"; then
      [[ -n $deadline ]] && ((SECONDS > deadline)) && kill -KILL "$pid" 2>/dev/null
      continue
    fi
    ended=0
    wait "$pid" || ended=$?
    unset "pids[$index]"
    left=$((left - 1))
    ((ended)) || continue
    echo "launch/local.sh: process $index ended with code $ended" >&2
    if ((!code)); then
      code=$ended
      deadline=$((SECONDS + ${GRACE:-660}))
    fi
  done
  sleep 0.2 || true # a signal ends it
done
exit "$code"
