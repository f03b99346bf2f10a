#!/usr/bin/env bash
# Sourced by dist_train.sh and slurm_train.sh: wait for a launcher, hand signals on,
# and end with the status for "start me again" if the training asks for it.

# EX_TEMPFAIL of sysexits.h, see docs/preemption.md
REQUEUE_STATUS=75

# launch_and_wait MARKER COMMAND...
#   Runs COMMAND. MARKER is a file in which tools/train.py notes that it was stopped
#   by a signal. A SIGUSR1 to this script becomes $HAND_ON_USR1 [USR1] for COMMAND.
#   Returns 75 after such a stop, else the status of COMMAND.
launch_and_wait() {
    local marker=$1 command_pid=0 signals=0 waited=1 status=0
    shift
    rm -f "$marker"

    hand_on() {
        waited=0
        signals=$((signals + 1))
        if [ "$signals" -eq 1 ] || [ -z "${SECOND_TO_CHILDREN:-}" ]; then
            kill -s "$1" "$command_pid" 2>/dev/null || true
        else
            # torchrun would leave its processes alone and go
            local child children
            children=$(ps -o pid= --ppid "$command_pid" 2>/dev/null || true)
            for child in ${children:-$command_pid}; do
                kill -s "$1" "$child" 2>/dev/null || true
            done
        fi
    }

    # a process group of its own, so that Ctrl-C comes from here alone, once
    set -m
    # what is ignored stays so in COMMAND: torchrun would die of a SIGUSR1 that Slurm
    # sends to everybody, and train.py sets its own handler
    if [ -n "${HAND_ON_USR1:-}" ]; then trap '' USR1; fi
    MMREST_REQUEUE_FILE=$marker "$@" &
    command_pid=$!
    trap "hand_on ${HAND_ON_USR1:-USR1}" USR1
    trap 'hand_on TERM' TERM
    trap 'hand_on INT' INT
    trap 'hand_on HUP' HUP

    while :; do
        waited=1
        wait "$command_pid" && status=0 || status=$?
        # 0: a signal came in between, and the command still runs or has just ended
        if [ "$waited" -eq 1 ]; then break; fi
    done
    trap - USR1 TERM INT HUP
    set +m

    if grep -qs saved "$marker"; then
        status=$REQUEUE_STATUS
    elif grep -qs start "$marker" && [ "$signals" -gt 0 ]; then
        # stopped before the training began; without a signal to this script it was
        # torchrun that ended the others after a failure
        status=$REQUEUE_STATUS
    fi
    rm -f "$marker"
    return "$status"
}
