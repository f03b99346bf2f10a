#!/usr/bin/env bash
# Train on a Slurm cluster.
#
#   GPUS=16 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
#
# GPUS [8] in all, GPUS_PER_NODE [8], CPUS_PER_TASK [5], SRUN_ARGS [none].
# In a batch job with --requeue it puts the job into the queue again if it is stopped
# by a signal before its time is up, and continues then, see docs/preemption.md.
set -euo pipefail
# shellcheck source=launchers.sh
source "$(dirname "${BASH_SOURCE[0]}")/launchers.sh"
# shellcheck source=requeue.sh
source "$HERE/requeue.sh"
need 4 'PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]' "$@"

OPTIONS=("${@:5}")
# A job that Slurm starts again goes on, whoever had it requeued.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [[ " ${OPTIONS[*]-} " != *" --resume"* ]]; then
    OPTIONS=(--resume ${OPTIONS[@]+"${OPTIONS[@]}"})
fi

# The processes may be on other machines, and the work folder is on all.
mkdir -p "$4"
MARKER=$(cd "$4" && pwd)/.requeue-${SLURM_JOB_ID:-$$}
STATUS=0
use_srun "$1" "$2"
launch_and_wait "$MARKER" "${LAUNCH[@]}" "$HERE/train.py" "$3" --work-dir="$4" \
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
