#!/usr/bin/env bash
# Makes .venv with everything the project needs; where it is already current, does nothing.
#
#   scripts/setup.sh          set up .venv
#   scripts/setup.sh --find   only print the Python interpreter it would use
#
# Exit codes: 0 done, 2 no usable Python (or something else in the place of .venv), 1 installation failed.
# $PYTHON names the interpreter to try first. JAXDISTILL_SYSTEM_ROOT stands before /usr/local, /opt and
# the like, so that the search can be tested on a machine that has a Python there.
set -euo pipefail
unset CDPATH # with it, cd prints where it went

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV="$ROOT/.venv"
HOME=${HOME:-/nonexistent}
SYSTEM=${JAXDISTILL_SYSTEM_ROOT:-}
# The first is the version that constraints.txt was made and tested with.
VERSIONS="3.12 3.13 3.14"

# Settings that would leak foreign packages into the environment, or make a version manager download.
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
export UV_PYTHON_DOWNLOADS=never MISE_AUTO_INSTALL=0 MISE_NOT_FOUND_AUTO_INSTALL=0

# A name or a version in a path proves nothing (shims, broken builds, Debian without python3-venv), so each
# candidate has to run this. It prints the interpreter behind a shim or another virtual environment: ours
# must outlive both.
PROOF='
import os, platform, sys, sysconfig
wanted = sys.version_info >= (3, 12) and sys.version_info.releaselevel == "final"
wanted = wanted and platform.python_implementation() == "CPython" and sys.maxsize > 2**32
if not wanted or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
import ctypes, ensurepip, ssl, venv, zlib
base = getattr(sys, "_base_executable", None) or sys.executable
print(base if os.access(base, os.X_OK) else sys.executable)
'

# Prints one word about .venv. The stamp is written last, so that a killed installation has none; it holds
# the place, because neither a moved environment nor a moved checkout works. Given a second argument,
# writes the stamp instead.
EXAMINE='
import hashlib, importlib.util, pathlib, sys
root, stamp = pathlib.Path(sys.argv[1]), pathlib.Path(sys.prefix, "jaxdistill-stamp")
digest = hashlib.sha256()
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes() + b"\0")
place = f"{root} {sys.prefix} {sys.version_info[:3]}"
if len(sys.argv) > 2:
    stamp.write_text(f"{place}\n{digest.hexdigest()}\n")
    sys.exit()
installed = all(importlib.util.find_spec(name) for name in ("jaxdistill", "jax", "pip", "pytest"))
was_place, was_digest = stamp.read_text().splitlines()
if was_place != place or not installed:
    print("broken")
else:
    print("current" if was_digest == digest.hexdigest() else "stale")
'

prove() { # prints the real interpreter behind candidate $1, or fails
  [ -x "$1" ] && [ ! -d "$1" ] && "$1" -I -c "$PROOF" 2>/dev/null </dev/null
}

names() { # the file names an interpreter can have, best first
  local version
  for version in $VERSIONS; do echo "python$version"; done
  echo python3
  echo python
}

manager_folders() { # bin folders of version managers and usual places; most do not exist
  local data=${XDG_DATA_HOME:-$HOME/.local/share} pyenv_root=""
  if command -v pyenv >/dev/null 2>&1; then pyenv_root=$(pyenv root 2>/dev/null || true); fi
  local root
  for root in "${PYENV_ROOT:-}" "$pyenv_root" "$HOME/.pyenv"; do
    if [ -n "$root" ]; then printf '%s\n' "$root"/versions/*/bin; fi
  done
  printf '%s\n' "${UV_PYTHON_INSTALL_DIR:-$data/uv/python}"/*/bin
  printf '%s\n' "${ASDF_DATA_DIR:-$HOME/.asdf}"/installs/python/*/bin
  printf '%s\n' "${MISE_DATA_DIR:-$data/mise}"/installs/python/*/bin
  for root in "${CONDA_PREFIX:-}" "${MAMBA_ROOT_PREFIX:-}" "$HOME"/{mini,ana}conda3 "$HOME"/mini{forge3,mamba3} \
    "$HOME"/{mambaforge,micromamba,.conda}; do
    if [ -n "$root" ]; then printf '%s\n' "$root/bin" "$root"/envs/*/bin; fi
  done
  printf '%s\n' "$HOME/.local/bin" "$SYSTEM"/usr/local/bin "$SYSTEM"/usr/bin "$SYSTEM"/usr/local/opt/python@3*/bin
  printf '%s\n' "$SYSTEM"/usr/local/*/bin "$SYSTEM"/opt/bin "$SYSTEM"/opt/*/bin "$SYSTEM"/opt/*/*/bin
  printf '%s\n' "$SYSTEM"/opt/*/envs/*/bin "$SYSTEM"/opt/*/versions/*/bin
  printf '%s\n' "$SYSTEM"/Library/Frameworks/Python.framework/Versions/*/bin
}

find_python() { # prints the first interpreter that proves itself, or fails
  local name folder candidate version folders
  if [ -n "${PYTHON:-}" ]; then
    candidate=$(type -P "$PYTHON" || true)
    if [ -n "$candidate" ] && prove "$candidate"; then return; fi
    echo "setup: PYTHON=$PYTHON is not a usable Python 3.12 or newer; looking for another" >&2
  fi
  while read -r name; do
    # All of the PATH, not only the first hit: a shim that does not start hides what lies behind it.
    while read -r candidate; do
      if prove "$candidate"; then return; fi
    done < <(type -aP "$name" || true)
  done < <(names)
  if command -v uv >/dev/null 2>&1; then
    for version in $VERSIONS; do
      candidate=$(cd / && uv python find "$version" 2>/dev/null || true)
      if [ -n "$candidate" ] && prove "$candidate"; then return; fi
    done
  fi
  folders=$(manager_folders)
  while read -r name; do
    while read -r folder; do
      if prove "$folder/$name"; then return; fi
    done <<<"$folders"
  done < <(names)
  return 1
}

need_python() {
  find_python && return
  echo "jaxdistill needs Python 3.12 or newer (64-bit CPython with venv, ensurepip and ssl), and none was found on" \
    "the PATH, in pyenv, uv, asdf, mise or conda, or under /usr/local and /opt: install one, or name it as" \
    "PYTHON=/path/to/python3.12." >&2
  exit 2
}

install() {
  echo "setup: installing into .venv (a few minutes the first time)" >&2
  rm -f "$VENV/jaxdistill-stamp"
  # -qq: errors only. Without it a machine's own pip settings fill the screen with warnings.
  if ! (cd "$ROOT" && "$VENV/bin/python" -I -m pip install -qq --no-input --disable-pip-version-check \
    -c constraints.txt -e '.[test,docs]'); then
    echo "setup: the installation failed for the reason above; the next call starts it anew" >&2
    exit 1
  fi
  "$VENV/bin/python" -I -c "$EXAMINE" "$ROOT" write
}

main() {
  local python state
  if [ "${1:-}" = --find ]; then
    need_python
    return
  fi
  # Where there is flock (Linux), two calls at once do not install over each other. The lock is on the
  # folder, so no file is left.
  exec 9<"$ROOT"
  if command -v flock >/dev/null 2>&1; then flock 9; fi
  state=$("$VENV/bin/python" -I -c "$EXAMINE" "$ROOT" 2>/dev/null || echo broken)
  if [ "$state" = current ]; then return; fi
  if [ "$state" != stale ]; then
    if [ -e "$VENV" ] && [ ! -d "$VENV" ]; then
      echo "setup: $VENV is not a folder; move it away, since the environment is made there" >&2
      exit 2
    fi
    python=$(need_python)
    echo "setup: making .venv with $python" >&2
    if ! "$python" -I -m venv --clear "$VENV"; then
      echo "setup: $python could not make $VENV for the reason above; name another one as PYTHON=..." >&2
      exit 1
    fi
  fi
  install
}

main "$@"
