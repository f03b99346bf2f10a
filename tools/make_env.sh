#!/usr/bin/env bash
# Makes the virtual environment of `make env`; does nothing if it is up to date.
#
#   tools/make_env.sh STACK ENV
#
# STACK is openmmlab or onedl, ENV the folder of the environment. Variables:
#   PYTHON           interpreter to make it with [first supported one found]
#   TORCH            torch version instead of the pinned one; needs TORCHVISION
#   TORCHVISION      torchvision version that belongs to TORCH
#   TORCH_INDEX      index to take torch and torchvision from, e.g. a CPU-only one
#   MMCV_FIND_LINKS  page with prebuilt mmcv wheels; nothing is compiled then
#   MMCV_CUDA=0      compile mmcv for the CPU alone although torch sees a GPU
#   MAX_JOBS         files compiled at a time [from cores and memory]
set -euo pipefail

# An install needs 6 GB, and pip unpacks what it downloads beside it.
NEEDED_GB=9

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stack=${1:-openmmlab}
env=${2:-$here/.venv-$stack}

say() { printf 'make env: %s\n' "$*"; }

# die PROBLEM FIX...: what is wrong, then what to do, a line each.
die() {
  printf '\nmake env: %s\n' "$1" >&2
  shift
  printf '  -> %s\n' "$@" >&2
  exit 1
}

# --- what must be there before anything is installed ---

check_stack() {
  case $stack in
    openmmlab) mmcv=mmcv supported='9 10 11 12' ;;
    onedl) mmcv=onedl-mmcv supported='10 11 12' ;;
    *) die "unknown stack '$stack'" 'Use STACK=openmmlab or STACK=onedl.' ;;
  esac
  requirements=$here/requirements/$stack.txt
  versions="3.${supported%% *} to 3.${supported##* }"
  case ${TORCH:-2.4} in
    1.* | 2.[0-3] | 2.[0-3].*)
      die "TORCH=$TORCH is too old: mmrest needs torch 2.4" \
        'Leave TORCH unset for the tested version, or give 2.4 or later.'
      ;;
  esac
  if [ -n "${TORCH:-}" ] && [ -z "${TORCHVISION:-}" ]; then
    die "TORCH=$TORCH is set, TORCHVISION is not" \
      'Give both; torch 2.N belongs to torchvision 0.(N+15).'
  fi
}

python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_supported() {
  local minor
  for minor in $supported; do
    [ "$1" = "3.$minor" ] && return 0
  done
  return 1
}

find_python() {
  local found candidate
  if [ -n "${PYTHON:-}" ]; then
    found=$(python_version "$PYTHON") ||
      die "PYTHON=$PYTHON is not a Python interpreter" \
        "Give the path of Python $versions."
    is_supported "$found" ||
      die "PYTHON=$PYTHON is Python $found; the $stack stack needs $versions" \
        "Give another one, e.g. PYTHON=python3.11."
    python=$PYTHON
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.10 python3.9; do
    if found=$(python_version "$candidate") && is_supported "$found"; then
      python=$candidate
      return
    fi
  done
  found=$(python_version python3) || found=none
  die "no Python $versions found (python3: $found)" \
    'Debian, Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev' \
    'or point to one with PYTHON=/path/to/python3.11'
}

check_venv() {
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "Python $(python_version "$python") has no venv module (ensurepip is missing)" \
      "Debian, Ubuntu: apt-get install python$(python_version "$python")-venv"
}

check_compiler() {
  [ -n "${MMCV_FIND_LINKS:-}" ] && return
  local compiler header
  for compiler in "${CXX:-g++}" c++ g++ clang++; do
    command -v "$compiler" >/dev/null 2>&1 && break
    compiler=
  done
  [ -n "$compiler" ] ||
    die 'no C++ compiler found, and mmcv has to be compiled' \
      'Debian, Ubuntu: apt-get install g++      Fedora: dnf install gcc-c++' \
      'macOS: xcode-select --install' \
      'or take a prebuilt mmcv: MMCV_FIND_LINKS=<page with wheels for your torch>'
  export CXX=$compiler
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -f "$header/Python.h" ] ||
    die "the headers of Python $(python_version "$python") are missing ($header/Python.h)" \
      "Debian, Ubuntu: apt-get install python$(python_version "$python")-dev" \
      "Fedora: dnf install python3-devel"
}

check_folder() {
  if [ -e "$env" ] && [ ! -f "$env/mmrest-stack" ]; then
    [ -d "$env" ] && [ -z "$(ls -A "$env")" ] ||
      die "$env exists and was not made by make env; it is left alone" \
        'Give another folder: ENV=...' \
        'or use your own environment: pip install -e . && python -m mmrest.doctor'
  elif [ -f "$env/mmrest-stack" ] && [ "$(cat "$env/mmrest-stack")" != "$stack" ]; then
    die "$env holds the $(cat "$env/mmrest-stack") stack, not $stack" \
      'Both install the same modules, so each needs a folder of its own: ENV=...'
  fi
}

check_space() {
  local parent free
  parent=$env
  while [ ! -d "$parent" ]; do parent=$(dirname "$parent"); done
  free=$(df -Pk "$parent" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge "$NEEDED_GB" ] ||
    die "$parent has $free GB free; the environment needs $NEEDED_GB GB" \
      'Free some space, or put the environment elsewhere: ENV=/path/to/folder'
}

# --- installing ---

pip_install() {
  "$env/bin/python" -m pip --log "$log" --disable-pip-version-check \
    install --no-warn-script-location "$@"
}

# Says why the last pip command failed, as far as its log tells.
explain() {
  local again="Then give the same command again; it goes on where it stopped."
  if grep -q 'No space left on device' "$log"; then
    die 'the disk is full' \
      'Free some space (pip also needs it in TMPDIR and in its cache).' "$again"
  elif grep -qE 'cc1plus.*Killed|Killed signal terminated program' "$log"; then
    die 'the compiler ran out of memory' 'Compile one file at a time: MAX_JOBS=1' "$again"
  elif grep -qE 'CUDA_HOME environment variable is not set|detected CUDA version' "$log"
  then
    die 'torch sees a GPU, but no CUDA toolkit of its version is there to compile mmcv' \
      'Install the CUDA toolkit that torch was built with,' \
      'or take a prebuilt mmcv: MMCV_FIND_LINKS=<page with wheels for your torch>,' \
      'or do without the GPU operators: MMCV_CUDA=0'
  elif grep -qE 'C\+\+20|std=c\+\+20' "$log" && grep -q 'error:' "$log"; then
    die 'this torch needs C++20, which this mmcv is not written for' \
      'Use a torch before 2.14 (leave TORCH unset for the tested one).'
  elif grep -qE 'No matching distribution|Could not find a version' "$log"; then
    die "$1 failed: a pinned package is not on the package index" \
      "$(grep -E 'No matching distribution|Could not find a version' "$log" | tail -1)" \
      'Check PIP_INDEX_URL, TORCH_INDEX and the processor: not every one has wheels.'
  elif grep -qE 'NewConnectionError|Temporary failure in name|ReadTimeout|SSLError' "$log"
  then
    die "$1 failed: the package index could not be reached" \
      'Check the network and proxy settings (HTTPS_PROXY, PIP_INDEX_URL).' "$again"
  fi
  die "$1 failed" "The last lines above say why; all of it is in $log." "$again"
}

# step NAME COMMAND...: runs it; explains a failure by what it logged.
step() {
  local name=$1
  shift
  say "$name"
  : >"$log"
  "$@" || explain "$name"
}

make_venv() {
  [ -x "$env/bin/python" ] && "$env/bin/python" -m pip --version >/dev/null 2>&1 && return
  "$python" -m venv "$env"
}

install_torch() {
  local index=()
  [ -n "${TORCH_INDEX:-}" ] && index=(--index-url "$TORCH_INDEX")
  if [ -n "${TORCH:-}" ]; then
    echo "torch===$TORCH" >"$env/torch.txt"
    echo "torchvision===$TORCHVISION" >>"$env/torch.txt"
  else
    grep -E '^torch(vision)?[=<>]' "$requirements" >"$env/torch.txt"
  fi
  # -c: torch would bring a setuptools with which mmcv cannot be compiled.
  pip_install ${index[@]+"${index[@]}"} -r "$env/torch.txt" \
    -c "$here/requirements/build.txt"
}

# What later steps must not move, and the versions that the tests ran with.
write_constraints() {
  "$env/bin/python" - >"$env/constraints.txt" <<'PYTHON'
from importlib.metadata import version

for name in ('torch', 'torchvision'):
    print(f'{name}==={version(name)}')
PYTHON
  grep -E '^(numpy|opencv-python|(onedl-)?mmengine)[=<>]' "$requirements" \
    >>"$env/constraints.txt"
  grep -v '^#' "$here/requirements/build.txt" >>"$env/constraints.txt"
  [ -n "${TORCH:-}" ] || grep -v '^#' "$here/requirements/tested.txt" \
    >>"$env/constraints.txt" || true
}

compile_jobs() {
  "$env/bin/python" -c '
import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
print(max(1, min(cores, int(memory / 2**31))))'
}

# Turns the thousands of lines of a compilation into one every few seconds.
show_progress() {
  local line last=-99 start=$SECONDS
  while IFS= read -r line; do
    if [[ $line =~ ^[[:space:]]*\[([0-9]+)/([0-9]+)\] ]]; then
      if ((SECONDS - last >= 10)) || [ "${BASH_REMATCH[1]}" = "${BASH_REMATCH[2]}" ]; then
        last=$SECONDS
        say "  mmcv: ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files compiled after" \
          "$((SECONDS - start)) s"
      fi
    elif [[ $line == *rror:* ]]; then
      printf '%s\n' "$line"
    fi
  done
}

# install_mmcv PIP-OPTION...
install_mmcv() {
  local wanted
  wanted=$(grep -E "^$mmcv==" "$requirements")
  if [ -n "${MMCV_FIND_LINKS:-}" ]; then
    pip_install --only-binary "$mmcv" -f "$MMCV_FIND_LINKS" \
      -c "$env/constraints.txt" "$wanted" "$@"
    return
  fi
  if [ "${MMCV_CUDA:-}" = 0 ]; then
    export CUDA_VISIBLE_DEVICES='' FORCE_CUDA=0
  fi
  MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(compile_jobs)} pip_install -v --no-build-isolation \
    --no-binary "$mmcv" -c "$env/constraints.txt" "$wanted" "$@" 2>&1 | show_progress
}

# Loads the operators alone: importing mmcv may fail for other reasons (OpenCV).
mmcv_works() {
  "$env/bin/python" - >>"$log" 2>&1 <<'PYTHON'
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.util import find_spec, module_from_spec

import torch

folders = find_spec('mmcv').submodule_search_locations
spec = PathFinder.find_spec('_ext', folders)
if spec is None:
    raise SystemExit(f'no _ext{EXTENSION_SUFFIXES[0]} in {list(folders)}')
ops = module_from_spec(spec)
spec.loader.exec_module(ops)
box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
ops.nms(box, torch.ones(1), iou_threshold=0.5, offset=0)
PYTHON
}

# pip keeps the wheel it built under mmcv's version alone. One that was built for
# another torch does not load, so it is built again, once, without that cache.
ensure_mmcv() {
  install_mmcv || return
  mmcv_works && return
  say "the $mmcv at hand does not work with this torch; compiling it anew"
  install_mmcv --no-cache-dir --force-reinstall --no-deps && mmcv_works
}

install_rest() {
  grep -vE '^#|^(torch|torchvision|mmcv|onedl-mmcv)[=<>]' "$requirements" >"$env/rest.txt"
  pip_install -c "$env/constraints.txt" -r "$env/rest.txt" -r "$here/requirements/dev.txt"
}

# The usual build of OpenCV needs libraries of a desktop, which servers lack.
ensure_opencv() {
  "$env/bin/python" -c 'import cv2' >>"$log" 2>&1 && return
  say "OpenCV lacks a system library here; taking the build without windows"
  "$env/bin/python" -m pip --log "$log" uninstall -q -y opencv-python \
    opencv-python-headless
  pip_install --no-deps -c "$env/constraints.txt" opencv-python-headless
  "$env/bin/python" -c 'import cv2'
}

install_package() {
  pip_install -q --no-deps --no-build-isolation -e "$here"
}

# --- what is up to date ---

# Everything that an installed environment depends on; any change of it installs anew.
fingerprint() {
  (
    cd "$here"
    echo "$stack $env $here ${TORCH:-} ${TORCHVISION:-} ${TORCH_INDEX:-}" \
      "${MMCV_FIND_LINKS:-} ${MMCV_CUDA:-}"
    cksum requirements/*.txt setup.py pyproject.toml mmrest/version.py \
      tools/make_env.sh
  )
}

is_up_to_date() {
  [ -f "$stamp" ] && [ -x "$env/bin/python" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]
}

# Two calls at a time, of `make demo` and `make test` say, must not install together.
take_turns() {
  command -v flock >/dev/null || return 0
  exec 9>"$env/mmrest-lock"
  flock --nonblock 9 && return
  say "another make env is at work in $env; waiting for it"
  flock 9
}

main() {
  check_stack
  case $env in /*) ;; *) env=$PWD/$env ;; esac
  stamp=$env/mmrest-installed
  log=$env/mmrest-install.log
  is_up_to_date && return
  check_folder
  find_python
  check_venv
  check_compiler
  [ -f "$stamp" ] || check_space

  mkdir -p "$env"
  echo "$stack" >"$env/mmrest-stack"
  take_turns
  is_up_to_date && return
  # Only a finished install has a stamp.
  rm -f "$stamp"
  unset PYTHONPATH PYTHONHOME
  export PYTHONNOUSERSITE=1 PIP_USER=0
  say "$stack stack in $env with $("$python" --version), from $(command -v "$python")"
  say 'takes about 12 minutes on two cores, most of it for compiling mmcv'
  step '1/6 virtual environment' make_venv
  step '2/6 build tools' pip_install -q -r "$here/requirements/build.txt"
  step '3/6 torch and torchvision (a large download)' install_torch
  write_constraints
  step "4/6 $mmcv with its compiled operators" ensure_mmcv
  step '5/6 the other packages' install_rest
  step '    OpenCV' ensure_opencv
  step '6/6 mmrest' install_package
  "$env/bin/python" -m mmrest.doctor --require torchvision mmdet mmseg mmpretrain ||
    die 'the environment is installed but does not fit together' \
      'See the fixes above, then give the same command again.'
  fingerprint >"$stamp"
  say "done: $env (activate with: source $env/bin/activate)"
}

# In one line, so that bash has read it all should the file change meanwhile.
main; exit
