#!/usr/bin/env bash
# Embedding as a SLURM array: each task makes parts of its own, and none waits for another.
#
#   sbatch --array=0-63 experiments/launch/slurm_array.sh --model ViT-B-32:laion2b_s34b_b79k \
#       --data '/shared/data/{00000..41455}.tar' --out /shared/embeddings/b32
#
# Set the lines below to your cluster. Data, environment and the folder of --out have to be on a file
# system that all nodes share; PYTHON=PATH takes another environment than .venv.
#
# A minute before the time limit, and on preemption, SLURM sends SIGTERM: the task ends with 75, goes
# back into the queue, and makes there what it lacks. Whichever task ends last joins the lists. To run
# some tasks again say how many there were: OF=64 sbatch --array=3,17 ...

#SBATCH --job-name=clip_jax_embed
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -u
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit

# This shell outlives the SIGTERM that preemption sends to it as well.
trap : TERM

part=$SLURM_ARRAY_TASK_ID/${OF:-$SLURM_ARRAY_TASK_COUNT}
srun "${PYTHON:-.venv/bin/python}" -u -m clip_jax.embed --part-of "$part" "$@"
code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
