#!/usr/bin/env bash
# Everything that waits for a GPU, in order of worth; run it wherever there is one.
#
#     bash lab/gpu.sh [FOLDER]                      # results go to FOLDER, by default results/gpu
#     DATA_DIR=data/cifar10-images bash lab/gpu.sh  # also what needs CIFAR-10 as a folder of images
#
# It needs what requirements-dev.txt installs. Each item is bounded in time and writes one log. The same command goes on
# where an interrupted one stopped: an item whose log ends with "done" is skipped, any other is started again.
set -u
cd "$(dirname "$0")/.."
folder=${1:-results/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"

item() { # NAME SECONDS COMMAND...
    local log=$folder/$1.txt limit=$2
    shift 2
    if [ -f "$log" ] && [ "$(tail -n 1 "$log")" = done ]; then
        echo "$log: done before"
        return
    fi
    echo "$log: $* (at most $limit s)"
    timeout --signal=INT --kill-after=30 "$limit" "$@" >"$log" 2>&1
    local code=$?
    if [ $code = 0 ]; then echo done >>"$log"; else echo "stopped with code $code" | tee -a "$log"; fi
}

item tests 240 "$python" -m pytest -q tests/test_cuda.py
item benchmark 480 "$python" benchmark.py --device cuda --batch-size 512 --seconds 0.3 --output-dir "$folder/benchmark"
# a million images, in one command
item million 120 "$python" train.py --device cuda --dataset digits --image-size 32 --batch-size 2048 --steps 490 \
    --compile on --sample-every 490 --output-dir runs/gpu-million
if [ -n "${DATA_DIR:-}" ]; then
    # weights to publish, for as many images as there is time; the published ones are of a former network
    item long 420 "$python" train.py --device cuda --dataset folder --data-dir "$DATA_DIR" --random-ode-steps \
        --batch-size 512 --minutes 6 --precision bf16 --compile on --sample-every 100000 --output-dir runs/gpu-long
    # ten and thirty minutes of two cores with AVX2, by the images that those see; the thirty at the rates of the ten
    for minutes in 10 30; do
        here=$folder/$minutes-minutes-avx2
        mkdir -p "$here" && cp -n results/ten-minutes-avx2/costs.csv "$here"
        item "$minutes-minutes" 480 "$python" compare.py --arms true inspired unet:38k unet:38k-flat unet:75k-flat \
            unet:150k unet:150k-flat unet:300k --budget seconds --amount $((60 * minutes)) --class-conditional \
            --lrs 4e-3 8e-3 --sweep-share "$([ $minutes = 10 ] && echo 1 || echo 0.3333)" --compile --jobs 8 \
            --device cuda --num-images 1000 --dataset folder --data-dir "$DATA_DIR" --output-dir "$here"
    done
    # the rungs above 150k at the length of three epochs: where the ratio of parameters would be read
    for arm in unet:600k unet:2.4m; do
        item "three-epochs-${arm#unet:}" 480 "$python" compare.py --arms $arm --reference $arm --lrs 2e-3 4e-3 \
            --class-conditional --sweep-share 0.2 --compile --jobs 3 --device cuda --num-images 1000 --dataset folder \
            --data-dir "$DATA_DIR" --output-dir "comparisons/three-epochs-${arm#unet:}"
    done
fi
