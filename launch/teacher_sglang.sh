#!/usr/bin/env bash
# `launch/teacher_sglang.sh MODEL [SGLANG FLAGS...] [-- COMMAND...]`: SGLang serves the model folder MODEL to runs that
# ask it for scores: until it is stopped or, with COMMAND, until that ends.
#
#   GPUS=6,7 launch/teacher_sglang.sh models/Qwen3.5-35B-A3B
#   GPUS=6,7 launch/teacher_sglang.sh models/Qwen3.5-35B-A3B -- launch/local.sh 1 --config run.yaml
#
# What may be set in the environment:
#   GPUS           which of the machine's GPUs, with commas; the model is split over them. Default: the first.
#                  GPUS= leaves the choice to SGLang and its flags
#   HOST, PORT     where it listens: 127.0.0.1 and 30000. HOST=0.0.0.0 lets other machines ask
#   TEACHER_KEY    a key that requests must bring; the run then has teacher.api_key_env: TEACHER_KEY
#   SGLANG_PYTHON  the interpreter of an environment that has SGLang, one of its own (default: python3)
#   START_TIMEOUT  seconds until it must be healthy (1800)
#   LOG            where the server's output goes (runs/teacher-PORT.log)
# Flags for SGLang come after MODEL and win over those given here. COMMAND is started once the server is healthy and
# sees its address in TEACHER_URL. SIGTERM and SIGINT go to COMMAND; the server is stopped behind it, however it ends.
#
# Exit codes: COMMAND's. 75 where a signal came before COMMAND could answer it: nothing is lost, run the same again.
# 2 for settings that cannot work, 1 where the server does not start.
set -euo pipefail
set -m # the server and COMMAND have groups of their own: a signal reaches them once, from here

say() { echo "launch/teacher_sglang.sh: $*" >&2; }
fail() { # fail CODE WORDS...
  say "${*:2}"
  exit "$1"
}
alive() { kill -0 "$1" 2>/dev/null; }
log_end() { tail -n 30 "$log" | cut -c -300 >&2; }

if [[ $# -lt 1 || $1 == -* ]]; then
  fail 2 "usage: [GPUS=6,7] [PORT=30000] launch/teacher_sglang.sh MODEL [SGLANG FLAGS...] [-- COMMAND...]"
fi
model=$1
shift
flags=()
while (($#)) && [[ $1 != -- ]]; do
  flags+=("$1")
  shift
done
if (($#)); then
  shift
  (($#)) || fail 2 "no command behind --; leave -- out to serve until a signal comes"
fi
command=("$@")
host=${HOST:-127.0.0.1} port=${PORT:-30000} gpus=${GPUS-0} python=${SGLANG_PYTHON:-python3}
timeout=${START_TIMEOUT:-1800} log=${LOG:-runs/teacher-$port.log}
asked=$host
[[ $host == 0.0.0.0 ]] && asked=127.0.0.1
export TEACHER_URL=http://$asked:$port

[[ -f $model/config.json ]] ||
  fail 2 "no model at $model: expected a folder with config.json, *.safetensors and the tokenizer's files"
[[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || fail 2 "GPUS=$gpus: expected numbers with commas between them, such as 6,7"
[[ $timeout =~ ^[1-9][0-9]*$ ]] || fail 2 "START_TIMEOUT=$timeout: expected whole seconds"
# Another environment's variables would lead this one astray.
unset PYTHONHOME
python=(env -u PYTHONPATH "$python")
"${python[@]}" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("sglang") is None)' 2>/dev/null ||
  fail 2 "${python[3]} has no SGLang: make an environment for it alone (pip install 'sglang[all]') and name its" \
    "interpreter as SGLANG_PYTHON=.../bin/python"
# A server that is left over, or somebody else's, would answer in the place of ours.
taken=$("${python[@]}" -c 'import socket, sys; socket.create_server((sys.argv[1], int(sys.argv[2])))' \
  "$host" "$port" 2>&1) || fail 2 "cannot listen on $host:$port (${taken##*$'\n'}); choose another PORT"

# Scoring asks for the log-probabilities of whole rows, and what they take grows with the tokens read at once times the
# vocabulary: small pieces, and memory that the cache does not take.
server_line=(-m sglang.launch_server --model-path "$model" --host "$host" --port "$port"
  --chunked-prefill-size 4096 --mem-fraction-static 0.75)
variables=(SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK=1)
if [[ -n $gpus ]]; then
  commas=${gpus//[0-9]/}
  server_line+=(--tp $((${#commas} + 1)))
  variables+=("CUDA_VISIBLE_DEVICES=$gpus")
fi

server='' child='' stopped='' key_file=''
# shellcheck disable=SC2329 # called by a trap, like the next
end() { # the server and all it spawned, and the key
  [[ -z $key_file ]] || rm -f "$key_file"
  [[ -n $server ]] || return 0
  kill -TERM "$server" 2>/dev/null || true
  for ((tries = 0; tries < 100; tries++)); do
    alive "$server" || break
    sleep 0.2 || true
  done
  kill -KILL -- "-$server" 2>/dev/null || true
}
# shellcheck disable=SC2329
pass_on() {
  stopped=SIG$1
  [[ -z $child ]] || kill -"$1" -- "-$child" 2>/dev/null || true
}
trap end EXIT
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

if [[ -n ${TEACHER_KEY:-} ]]; then
  # In a file, because everybody on the machine sees command lines.
  key_file=$(mktemp --suffix=.yaml)
  "${python[@]}" -c 'import json, os; print(json.dumps({"api-key": os.environ["TEACHER_KEY"]}))' >"$key_file"
  server_line+=(--config "$key_file")
fi
mkdir -p "$(dirname "$log")"
(umask 077 && : >"$log") && chmod 600 "$log" # SGLang writes its settings into it, the key among them
env "${variables[@]}" "${python[@]}" "${server_line[@]}" "${flags[@]}" >"$log" 2>&1 </dev/null &
server=$!
disown "$server" # else bash itself says how it ended
say "starting $model on $host:$port${gpus:+, GPUs $gpus}; its output goes to $log"

healthy() { # no proxy stands between a server and its own machine
  "${python[@]}" -c 'import sys; from urllib.request import ProxyHandler, build_opener
build_opener(ProxyHandler({})).open(sys.argv[1], timeout=5)' "$TEACHER_URL/health_generate" 2>/dev/null
}
until healthy; do
  [[ -z $stopped ]] || fail 75 "got $stopped before the teacher was healthy; run the same command again"
  if ! alive "$server"; then
    log_end
    fail 1 "the server ended while starting; the end of $log is above"
  fi
  if ((SECONDS > timeout)); then
    log_end
    fail 1 "the server was not healthy within START_TIMEOUT=$timeout s; the end of $log is above"
  fi
  sleep 0.5 || true
done
say "healthy at $TEACHER_URL after $SECONDS s"

if ((!${#command[@]})); then
  while alive "$server"; do
    [[ -z $stopped ]] || exit 143
    sleep 0.5 || true
  done
  log_end
  fail 1 "the server ended by itself; the end of $log is above"
fi

[[ -z $stopped ]] || fail 75 "got $stopped before the command was started; run the same command again"
"${command[@]}" &
child=$!
gone=
while alive "$child"; do
  if [[ -z $gone ]] && ! alive "$server"; then
    gone=1
    log_end
    say "the server ended while the command runs; the end of $log is above"
  fi
  sleep 0.2 || true # a signal ends it
done
code=0
wait "$child" || code=$?
[[ -z $stopped ]] || ((code != 143 && code != 130)) || code=75
exit "$code"
