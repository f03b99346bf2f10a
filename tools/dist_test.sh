#!/usr/bin/env bash
# Test with several processes, one a GPU; without GPUs they talk through gloo.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
#
# Several machines: NNODES, NODE_RANK (0 on the first), MASTER_ADDR and PORT on each.
set -euo pipefail
# shellcheck source=launchers.sh
source "$(dirname "${BASH_SOURCE[0]}")/launchers.sh"
need 3 'CONFIG CHECKPOINT GPUS [options of tools/test.py]' "$@"

use_torchrun "$3"
exec "${LAUNCH[@]}" "$HERE/test.py" "$1" "$2" --launcher pytorch "${@:4}"
