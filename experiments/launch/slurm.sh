#!/usr/bin/env bash
# A run on SLURM: one process a node, which drives all of the node's GPUs.
#
#   sbatch experiments/launch/slurm.sh --config experiments/vit_b16.py --workdir /shared/runs/b16 \
#       --config.data.train='/shared/data/{00000..41455}.tar'
#
# Set the lines below to your cluster. Code, data, work folder and environment have to be on a file
# system that all nodes share; PYTHON=PATH takes another environment than .venv. JAX finds the nodes
# in SLURM's environment; nothing else is needed.
#
# Three minutes before the time limit, and on preemption, SLURM sends SIGTERM to every process: the
# run saves, all processes exit with 75, and the job goes back into the queue to continue. With any
# other code it ends. Steps longer than those three minutes need an earlier signal.

#SBATCH --job-name=clip_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit

# This shell outlives the SIGTERM that preemption sends to it as well; an ignored signal would be
# inherited by the processes, a handled one is not.
trap : TERM

# --kill-on-bad-exit=0: when one process fails the others are told why, and end by themselves.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" -u -m clip_jax.main "$@"
code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
