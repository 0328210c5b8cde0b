#!/usr/bin/env bash
# Train on this machine, and start again whenever the run was stopped by a signal, or failed, until it is done:
#
#   scripts/train_and_requeue.sh python train.py --cfg-path run.yaml --options run.save_every_minutes=10
#   scripts/train_and_requeue.sh torchrun --nproc_per_node 4 train.py --cfg-path run.yaml --options …
#
# The arguments are the command of the run, which must end with --options or their values: the run goes on by
# run.resume_ckpt_path=auto. A signal to this script (SIGTERM, SIGUSR1, Ctrl-C) is passed on; the run saves, and this
# script ends with status 75, so that whatever started it can start it again.
# MAX_FAILURES (3): how many times in a row the run may fail by itself.
set -u
[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }

signalled=0 child=
pass_on() {
    signalled=1
    [ -z "$child" ] || kill -"$1" "$child" 2>/dev/null
}
trap 'pass_on TERM' TERM USR1  # torchrun passes SIGTERM on to its processes, but not SIGUSR1
trap 'pass_on INT' INT

failures=0
while true; do
    # In a session of its own, so that Ctrl-C reaches the run once.
    setsid "$@" run.resume_ckpt_path=auto &
    child=$!
    while true; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break  # a trapped signal ends `wait` before the run has ended
    done
    child=
    [ $status -eq 0 ] && exit 0
    [ $signalled -eq 1 ] && exit 75
    if [ $status -ne 75 ]; then  # torchrun ends with 1 for both; then it is counted, too
        failures=$((failures + 1))
        [ $failures -ge "${MAX_FAILURES:-3}" ] && exit $status
    else
        failures=0
    fi
    echo "The run ended with status $status; it is started again from its newest checkpoint." >&2
done
