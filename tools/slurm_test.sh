#!/usr/bin/env bash
# Test on a Slurm cluster.
#
#   GPUS=8 tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
#
# GPUS [8] in all, GPUS_PER_NODE [8], CPUS_PER_TASK [5], SRUN_ARGS [none].
set -euo pipefail
# shellcheck source=launchers.sh
source "$(dirname "${BASH_SOURCE[0]}")/launchers.sh"
need 4 'PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]' "$@"

use_srun "$1" "$2"
exec "${LAUNCH[@]}" "$HERE/test.py" "$3" "$4" --launcher=slurm "${@:5}"
