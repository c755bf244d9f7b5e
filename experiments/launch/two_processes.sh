#!/usr/bin/env bash
# One run over two processes of four virtual CPU devices each, on this machine: what a cluster's
# launcher does, by hand. It needs no GPU and shows that a run does not depend on how it is split.
#
#   experiments/launch/two_processes.sh --config experiments/emoji.py --workdir runs/two \
#       --config.mesh.fsdp=8 --config.train.steps=20 --config.eval.data=
#
# Arguments go to `python -m clip_jax.main` unchanged. The exit code is process 0's, or process 1's
# where that is 0. SIGTERM is passed on: the run saves, and the same command goes on from there.
#
#   PYTHON=python  DEVICES=4 (of each process)  PORT=9876
set -u

python=${PYTHON:-python}
address=localhost:${PORT:-9876}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-4}"

pids=()
for index in 0 1; do
    "$python" -m clip_jax.main --coordinator "$address" --num-processes 2 --process-id "$index" "$@" &
    pids+=($!)
done

# A trapped signal ends `wait` early: then wait again.
told=
trap 'told=yes; kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'told=yes' INT # the terminal sends Ctrl-C to the processes too

code=0
for pid in "${pids[@]}"; do
    while true; do
        told=
        wait "$pid"
        ended=$?
        [ -n "$told" ] || break
    done
    code=$((code ? code : ended))
done
exit "$code"
