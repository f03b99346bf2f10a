#!/usr/bin/env bash
# Sourced by dist_*.sh and slurm_*.sh: how they start processes.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}"

# need COUNT WORDS "$@": end with the usage unless there are COUNT arguments
need() {
    local count=$1 words=$2
    shift 2
    if [ $# -lt "$count" ]; then
        echo "usage: $0 $words" >&2
        exit 2
    fi
}

# use_torchrun GPUS: put the command that starts GPUS processes here into LAUNCH
use_torchrun() {
    case $1 in
        [1-9] | [1-9][0-9] | [1-9][0-9][0-9] | auto | cpu | gpu) ;;
        *)
            echo "$0: GPUS must be a number of processes, found '$1'" >&2
            exit 2
            ;;
    esac
    LAUNCH=(
        "${PYTHON:-python}" -m torch.distributed.run
        --nnodes="${NNODES:-1}"
        --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}"
        --master_port="${PORT:-29500}"
        --nproc_per_node="$1"
    )
}

# use_srun PARTITION JOB_NAME: put the command that starts $GPUS processes into LAUNCH
use_srun() {
    local gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
    if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
    # SRUN_ARGS holds several words.
    # shellcheck disable=SC2206
    LAUNCH=(
        srun -p "$1"
        --job-name="$2"
        --gres=gpu:"$per_node"
        --ntasks="$gpus"
        --ntasks-per-node="$per_node"
        --cpus-per-task="${CPUS_PER_TASK:-5}"
        --kill-on-bad-exit=1
        ${SRUN_ARGS:-}
        "${PYTHON:-python}" -u
    )
}
