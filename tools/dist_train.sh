#!/usr/bin/env bash
# Train with several processes, one a GPU; without GPUs they talk through gloo.
#
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
#
# Several machines: NNODES, NODE_RANK (0 on the first), MASTER_ADDR and PORT on each.
# SIGTERM or SIGUSR1 saves a checkpoint and ends with status 75, see docs/preemption.md.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [options of tools/train.py]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=requeue.sh
source "$HERE/requeue.sh"

export PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}"
# After SIGTERM torchrun kills its processes in 30 s; a checkpoint may take longer,
# and the scheduler has a limit of its own.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
HAND_ON_USR1=TERM
SECOND_TO_CHILDREN=1
MARKER_FOLDER=$(mktemp -d)
trap 'rm -rf "$MARKER_FOLDER"' EXIT

STATUS=0
launch_and_wait "$MARKER_FOLDER/requeue" \
    "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$GPUS" \
    "$HERE/train.py" "$CONFIG" --launcher pytorch "${@:3}" || STATUS=$?
if [ "$STATUS" -eq "$REQUEUE_STATUS" ]; then
    echo "$0: stopped by a signal; continue with --resume. Exit status $STATUS." >&2
fi
exit "$STATUS"
