#!/usr/bin/env bash
# A command on a Ray cluster that lives as long as its SLURM job: embed, evaluate, data.filter,
# data.reinforce or data.shard, with its arguments. Nothing has to run on the cluster before.
#
#   sbatch experiments/launch/slurm_ray.sh data.filter '/shared/data/{00000..41455}.tar' \
#       --model ViT-B-32:laion2b_s34b_b79k --out /shared/selected --top 0.3
#
# Set the lines below to your cluster. Data, environment and the folder of --out have to be on a file
# system that all nodes share; BIN=FOLDER takes another environment's programs than .venv/bin, and
# PORT another port than 6379. The command itself runs on the first node.
#
# A minute before the time limit, and on preemption, SLURM sends SIGTERM: the command ends with 75,
# the job goes back into the queue, and the command goes on there with the parts that it lacks.

#SBATCH --job-name=clip_jax_ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit
[ $# -gt 0 ] || { echo "usage: sbatch $0 embed | evaluate | data.filter ..." >&2; exit 2; }

bin=${BIN:-.venv/bin}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$head:${PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0

# --overlap: the command shares its node with Ray's own processes.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    "$bin/ray" start --head --port "${PORT:-6379}" --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --block &
for _ in $(seq 60); do
    "$bin/ray" status --address "$address" >/dev/null 2>&1 && break
    sleep 2
done
if [ ${#nodes[@]} -gt 1 ]; then
    others=$((${#nodes[@]} - 1))
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" \
        "$bin/ray" start --address "$address" --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --block &
fi

"$bin/python" -u -m "clip_jax.$1" "${@:2}" --executor ray --address "$address" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null' TERM
# A trapped signal ends `wait` early: then wait again.
while true; do
    wait "$command"
    code=$?
    kill -0 "$command" 2>/dev/null || break
done

# Ray's processes end with the job's steps.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
