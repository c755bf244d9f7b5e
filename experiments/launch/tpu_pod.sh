#!/usr/bin/env bash
# A run on a Cloud TPU pod slice: one process on each of its machines, started from here.
#
#   TPU=my-v5e-64 ZONE=us-west4-a experiments/launch/tpu_pod.sh install
#   TPU=my-v5e-64 ZONE=us-west4-a experiments/launch/tpu_pod.sh \
#       --config experiments/vit_b16.py --workdir /mnt/shared/runs/b16 \
#       --config.data.train='/mnt/shared/data/{00000..41455}.tar'
#
# `install` copies this repository to all machines and installs it; the second line trains. Data and
# work folder have to be on a file system that all machines share. JAX finds the machines by itself.
#
# A run that was told to stop (SIGTERM, as on maintenance) has saved and ends with 75: it is started
# again, until it ends with another code.
set -u

tpu=${TPU:?the name of the TPU, TPU=...}
zone=${ZONE:?its zone, ZONE=...}
folder=${FOLDER:-clip_jax}

on_all() {
    gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker=all --command "$1"
}

if [ "${1:-}" = install ]; then
    gcloud compute tpus tpu-vm scp --recurse . "$tpu:$folder" --zone "$zone" --worker=all &&
        on_all "cd $folder && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
    exit
fi
[ $# -gt 0 ] || { echo "usage: $0 install | --config FILE --workdir DIR ..." >&2; exit 2; }

# The arguments go through two shells, this one and the machines'. The loop runs on the machines: all
# of their processes agree on the code.
run=".venv/bin/python -u -m clip_jax.main$(printf ' %q' "$@")"
on_all "cd $folder && while true; do $run; code=\$?; [ \$code -eq 75 ] || exit \$code; sleep 10; done"
