#!/usr/bin/env bash
# Train with several processes, one a GPU; without GPUs they talk through gloo.
#
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
#
# Several machines: NNODES, NODE_RANK (0 on the first), MASTER_ADDR and PORT on each.
# SIGTERM or SIGUSR1 saves a checkpoint and ends with status 75, see docs/preemption.md.
set -euo pipefail
# shellcheck source=launchers.sh
source "$(dirname "${BASH_SOURCE[0]}")/launchers.sh"
# shellcheck source=requeue.sh
source "$HERE/requeue.sh"
need 2 'CONFIG GPUS [options of tools/train.py]' "$@"

# After SIGTERM torchrun kills its processes in 30 s; a checkpoint may take longer,
# and the scheduler has a limit of its own.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
HAND_ON_USR1=TERM
SECOND_TO_CHILDREN=1
MARKER_FOLDER=$(mktemp -d)
trap 'rm -rf "$MARKER_FOLDER"' EXIT

STATUS=0
use_torchrun "$2"
launch_and_wait "$MARKER_FOLDER/requeue" "${LAUNCH[@]}" \
    "$HERE/train.py" "$1" --launcher pytorch "${@:3}" || STATUS=$?
if [ "$STATUS" -eq "$REQUEUE_STATUS" ]; then
    echo "$0: stopped by a signal; continue with --resume. Exit status $STATUS." >&2
fi
exit "$STATUS"
