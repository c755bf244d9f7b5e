#!/bin/sh
# What a GPU says: training against open_clip with torch.compile, the kernels of our steps, encoding,
# the loss at 32,768 and GradCache, in bfloat16. At most 8 minutes, or LIMIT seconds: what has not
# ended by then is left out, with a line. The tables go to FOLDER, and from there into
# docs/performance.md.
#
#     sh benchmarks/on_gpu.sh FOLDER [PART ...]
#
# PYTHON has jax with CUDA, torch with CUDA and open_clip; PART is one of
# training, loss, gradcache, encoding.
set -u
folder=${1:?a folder for the tables}
shift
python=${PYTHON:-python}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$folder"
end=$(($(date +%s) + ${LIMIT:-480}))
bf16="--device gpu --dtype bfloat16"

# part SECONDS MODULE ARGUMENT...: a benchmark within its time, its table in $folder/$name.
part() {
    limit=$1
    shift
    left=$((end - $(date +%s)))
    [ "$left" -gt 0 ] || { echo "$name: left out, the time is over"; return; }
    [ "$limit" -lt "$left" ] || limit=$left
    mkdir -p "$folder/$name"
    timeout "$limit" "$python" -m "$@" --out "$folder/$name" >"$folder/$name/out.txt" 2>"$folder/$name/err.txt" ||
        { echo "$name: ended with code $?; the end of $folder/$name/err.txt:"; tail -n 3 "$folder/$name/err.txt"; }
    cat "$folder/$name/out.txt"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
for name in ${*:-training encoding loss gradcache}; do
    echo "== $name"
    case $name in
    training)
        part 390 benchmarks.on_gpu --profile "$folder/profile"
        for profile in "$folder"/profile/*/; do
            name=kernels-$(basename "$profile")
            part 60 benchmarks.kernels "$profile" --top 25 >"${profile%/}.txt" &
        done
        wait
        cat "$folder"/profile/*.txt
        ;;
    loss) part 90 benchmarks.loss --dtype bfloat16 --rows 32768 --beyond 65536 ;;
    gradcache) part 120 benchmarks.gradcache $bf16 --model ViT-B-16-quickgelu --batch 512 --microbatches 4 ;;
    encoding) part 120 benchmarks.encoding $bf16 --model ViT-B-16-quickgelu --batch 256 ;;
    *) echo "no part $name" && exit 2 ;;
    esac
done
