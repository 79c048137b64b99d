#!/usr/bin/env bash
# Rehearse the benchmark run of a GPU machine on a CPU: with the versions of constraints-gpu.txt, from
# a copy of the tree without .git that is not installed. Usage: scripts/gpu_rehearsal.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$PWD/.venv-gpu
output=$(realpath -m "${1:-build/gpu-rehearsal}")

if ! cmp -s constraints-gpu.txt "$environment/ready.txt"; then
    for python in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python python3; do
        if "$python" -c '' 2> /dev/null; then break; fi
    done
    echo "installing 5 GB for $("$python" --version): torch 2.11 has a CUDA build only"
    "$python" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install --quiet -c constraints-gpu.txt torch triton transformers \
        numpy huggingface_hub safetensors accelerate peft matplotlib rich typer pytest pytest-xdist \
        hypothesis
    cp constraints-gpu.txt "$environment/ready.txt"
fi

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -co --exclude-standard -z | tar --null --files-from=- --ignore-failed-read -c | tar -x -C "$copy"
cd "$copy"
unset PYTHONPATH PYTHONHOME TRITON_INTERPRET
"$environment/bin/python" -m benchmarks rehearse --output "$output"
