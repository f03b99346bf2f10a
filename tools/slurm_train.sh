#!/usr/bin/env bash
# Train on a Slurm cluster.
#
#   GPUS=16 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
#
# GPUS [8] in all, GPUS_PER_NODE [8], CPUS_PER_TASK [5], SRUN_ARGS [none].
# In a batch job with --requeue it puts the job into the queue again if it is stopped
# by a signal before its time is up, and continues then, see docs/preemption.md.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]" >&2
    exit 2
fi
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4
OPTIONS=("${@:5}")
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
if [ "$GPUS" -lt "$GPUS_PER_NODE" ]; then GPUS_PER_NODE=$GPUS; fi
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=requeue.sh
source "$HERE/requeue.sh"

export PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}"
# A job that Slurm starts again goes on, whoever had it requeued.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [[ " ${OPTIONS[*]-} " != *" --resume"* ]]; then
    OPTIONS=(--resume ${OPTIONS[@]+"${OPTIONS[@]}"})
fi

# The processes may be on other machines, and the work folder is on all.
mkdir -p "$WORK_DIR"
MARKER=$(cd "$WORK_DIR" && pwd)/.requeue-${SLURM_JOB_ID:-$$}
STATUS=0
# SRUN_ARGS holds several words.
# shellcheck disable=SC2086
launch_and_wait "$MARKER" \
    srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres=gpu:"$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$HERE/train.py" "$CONFIG" --work-dir="$WORK_DIR" \
    --launcher=slurm ${OPTIONS[@]+"${OPTIONS[@]}"} || STATUS=$?
if [ "$STATUS" -ne "$REQUEUE_STATUS" ]; then exit "$STATUS"; fi

# A job that was cancelled or that Slurm requeues itself is no longer running.
if [ -n "${SLURM_JOB_ID:-}" ] &&
    [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null)" = RUNNING ]; then
    echo "$0: stopped by a signal; job $SLURM_JOB_ID is put into the queue again." >&2
    scontrol requeue "$SLURM_JOB_ID" || true
else
    echo "$0: stopped by a signal; continue with --resume." >&2
fi
exit "$STATUS"
