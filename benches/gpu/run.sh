#!/usr/bin/env bash
# Tests and measures on a GPU. The programs are built on one machine and may run on another, which needs no Rust.
#
#   benches/gpu/run.sh build cuda          builds, and packs what has to travel into benches/gpu/packed.tar.xz
#   benches/gpu/run.sh run cuda results    runs what was packed, and writes results/gpu.json and results/log
#
# The backend is cuda, rocm, vulkan, metal or wgpu. `run` takes less than eight minutes, or LIMIT seconds: what does not fit is left
# out and the result says so. No suite of tests takes more than a fifth of that, so that time is left to measure. With a Python
# that has PyTorch and transformers in PYTHON, the same steps are measured in PEFT. Wheels of peers that this Python lacks travel
# too, in benches/gpu/wheels: PEFT, LyCORIS and what they need, and PEFT's rewrite of BOFT in benches/gpu/wheels/rewrite.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
}

packed=benches/gpu/packed.tar.xz
suites=(backends kernels equivalence orthogonality)

# The name of the executable that Cargo built for a target.
executable() {
    sed -n 's/.*"name":"'"$1"'".*"executable":"\([^"]*\)".*/\1/p' "$2" | tail -n 1
}

build() {
    local backend=$1 messages
    # Not local: the trap runs after the function has returned.
    folder=$(mktemp -d)
    messages="$folder/messages"
    trap 'rm -rf "$folder"' EXIT
    local tests=()
    for suite in "${suites[@]}"; do
        tests+=(--test "$suite")
    done
    cargo test --release -p burn-boft --features "$backend" --no-run --message-format json "${tests[@]}" >"$messages"
    cargo build --release -p burn-boft-benches --features "$backend" --bin step --message-format json >>"$messages"
    mkdir "$folder/gpu"
    [ ! -d benches/gpu/wheels ] || cp -r benches/gpu/wheels "$folder/gpu/"
    for name in "${suites[@]}" step; do
        strip -o "$folder/gpu/$name" "$(executable "$name" "$messages")"
    done
    # The programs hold the same libraries, which a large dictionary finds again.
    tar -C "$folder" -cf - gpu | xz -6 --lzma2=preset=6,dict=512MiB -T 1 >"$packed"
    du -h "$packed"
}

run() {
    local backend=$1 out=$2 limit=${LIMIT:-470} end
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    end=$((SECONDS + limit))
    tar -C "$folder" -xJf "$packed"
    : >"$out/log"
    : >"$out/lines"

    # Runs a command for a fifth of the time, or what is left of it, and notes how it ended.
    step() {
        local name=$1 left=$((end - SECONDS)) status=0
        shift
        if [ "$left" -lt 5 ]; then
            printf '{"part":"%s","status":"left out"}\n' "$name" >>"$out/lines"
            return
        fi
        [ "$left" -le $((limit / 5)) ] || left=$((limit / 5))
        printf '\n== %s\n' "$name" >>"$out/log"
        timeout "$left" "$@" >>"$out/log" 2>&1 || status=$?
        printf '{"part":"%s","status":%d}\n' "$name" "$status" >>"$out/lines"
    }
    measure() {
        local left=$((end - SECONDS))
        if [ "$left" -lt 5 ]; then
            printf '{"part":"%s","status":"left out"}\n' "$(basename "$1") ${*:2}" >>"$out/lines"
            return
        fi
        timeout "$left" "$@" 2>>"$out/log" | grep '^{' >>"$out/lines" ||
            printf '{"part":"%s","status":"failed"}\n' "$(basename "$1") ${*:2}" >>"$out/lines"
    }

    (nvidia-smi || vulkaninfo --summary || true) >>"$out/log" 2>&1
    # The suites compare with the tables of the repository.
    export BURN_DEVICE=$backend CARGO_MANIFEST_DIR=$PWD
    step name "$folder/gpu/backends" every_device_has_a_name --nocapture
    for suite in equivalence orthogonality kernels; do
        step "$suite" "$folder/gpu/$suite"
    done
    # A backend that the tables do not know yet is written into them.
    BURN_BOFT_TABLES=write step backends "$folder/gpu/backends" --nocapture
    cp README.md docs/backends.md "$out/"

    # Where the peers are installed; the rewrite comes before PEFT as it was released.
    local peers="$folder/peers" rewrite="$folder/rewrite:$folder/peers"
    if [ -n "${PYTHON:-}" ]; then
        for target in peers rewrite; do
            local wheels=("$folder/gpu/wheels/${target#peers}"/*.whl)
            [ ! -e "${wheels[0]}" ] ||
                step "install $target" "$PYTHON" -m pip install --no-index --no-deps --target "$folder/$target" "${wheels[@]}"
        done
    fi
    peers() {
        local path=$1
        shift
        [ -z "${PYTHON:-}" ] || measure env PYTHONPATH="$path" "$PYTHON" benches/peers/peft_step.py --device cuda --json \
            --rounds "${ROUNDS:-15}" "$@"
    }

    for dtype in f32 bf16; do
        for case in dinov2-s dinov2-l-block llm-linear-512 llm-linear-8192; do
            measure "$folder/gpu/step" --device "$backend" --dtype "$dtype" --case "$case" --rounds "${ROUNDS:-15}" --json
        done
        local torch=float32
        [ "$dtype" = f32 ] || torch=bfloat16
        peers "$peers" --dtype "$torch" --case dinov2-s
        [ ! -d "$folder/rewrite" ] ||
            peers "$rewrite" --dtype "$torch" --case dinov2-s --method boft-m1-b4 --method boft-m2-b4 --method boft-m4-b4
        peers "$peers" --dtype "$torch" --case llm-linear-512 --method lycoris-oft-b32 --method lycoris-boft-b8
    done
    # The size that the figures to reach on a GPU are for.
    local methods=(frozen boft-m2-b4 oft-b32 lora-r8)
    for dtype in f32 bf16; do
        measure "$folder/gpu/step" --device "$backend" --dtype "$dtype" --case dinov2-l --rounds 5 --json "${methods[@]/#/--method=}"
        measure "$folder/gpu/step" --device "$backend" --dtype "$dtype" --case decode --rounds 41 --json
    done
    { printf '[\n'; sed '$!s/$/,/' "$out/lines"; printf ']\n'; } >"$out/gpu.json"
    rm "$out/lines"
    grep -h '"status"' "$out/gpu.json" || true
}

case "${1:-}" in
build) [ $# = 2 ] || usage; build "$2" ;;
run) [ $# = 3 ] || usage; run "$2" "$3" ;;
*) usage ;;
esac
