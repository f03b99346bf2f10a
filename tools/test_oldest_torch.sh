#!/usr/bin/env bash
# Runs the tests of the backbone with the oldest torch that pyproject.toml promises, or
# with TORCH, and with mmcv-lite, which is all that the backbone needs of mmcv. Takes a
# few minutes and 6 GB (1 GB with TORCH_INDEX, an index of CPU builds).
#
#   tools/test_oldest_torch.sh [PYTEST-OPTION...]   TORCH=2.14.1 ENV=folder [.venv-oldest]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
env=${ENV:-.venv-oldest}

torch=${TORCH:-$(sed -nE 's/^dependencies = \["torch>=([0-9.]+)".*/\1/p' pyproject.toml)}
[ -n "$torch" ] || {
  echo 'test_oldest_torch: pyproject.toml names no torch>=X' >&2
  exit 1
}
stamp="$torch ${TORCH_INDEX:-}"
if [ "$(cat "$env/mmrest-torch" 2>/dev/null)" != "$stamp" ]; then
  "${PYTHON:-python3}" -m venv "$env"
  pip() { "$env/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
  pip 'setuptools<81' wheel
  pip ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$torch.*"
  # MMCV's own build wants setuptools and torch at hand
  pip --no-build-isolation numpy opencv-python-headless mmengine==0.10.7 \
    mmcv-lite==2.1.0
  pip -r <(grep -E '^(pytest|hypothesis)' requirements/dev.txt)
  echo "$stamp" >"$env/mmrest-torch"
fi
"$env/bin/python" -c 'import mmrest, torch; print("torch", torch.__version__)'
OMP_NUM_THREADS=1 PYTHONPATH=$here "$env/bin/python" -m pytest -n 2 --dist loadfile \
  -m 'not slow' tests/test_models tests/test_ops "$@"
