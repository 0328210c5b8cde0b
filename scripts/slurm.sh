#!/usr/bin/env bash
# Train in a Slurm job that requeues itself before its time is over, or when it is preempted:
#
#   sbatch scripts/slurm.sh torchrun --nproc_per_node 4 train.py --cfg-path run.yaml --options run.save_every_minutes=10
#
# Adapt the #SBATCH lines to your cluster. The arguments are the command of the run, which must end with --options or
# their values: each start goes on by run.resume_ckpt_path=auto. Two minutes before the time is over, Slurm sends SIGUSR1
# to this script, which lets the run save and puts the job back into the queue. On several nodes, give torchrun
# --nnodes, --rdzv-backend c10d and --rdzv-endpoint, and put srun before it.
#SBATCH --job-name=minigpt4
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

stopped=0 child=
stop() {
    stopped=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop USR1 TERM

"$@" run.resume_ckpt_path=auto &
child=$!
while true; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break  # a trapped signal ends `wait` before the run has ended
done
# 75: the run itself got the signal, as with `srun`.
if [ $status -ne 0 ] && { [ $stopped -eq 1 ] || [ $status -eq 75 ]; }; then
    echo "Stopped, with its state saved; job $SLURM_JOB_ID is put back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
