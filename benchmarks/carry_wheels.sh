#!/usr/bin/env bash
# Collect, as wheels, what a GPU machine without a network lacks for run_gpu.sh: its Python is taken to be 3.12 on x86-64
# (PYTHON_VERSION says otherwise), with torch, triton, numpy, pillow, safetensors, matplotlib, tensorboard and pytest.
#
#   benchmarks/carry_wheels.sh [FOLDER]         1 MB: omegaconf, simplejpeg, rich; FOLDER: .whl
#   benchmarks/carry_wheels.sh --dali [FOLDER]  and NVIDIA DALI for CUDA 13, as pieces of 55 MB: dali.tar.00, ...
#
# Copy the folder beside benchmarks/ there; run_gpu.sh installs from it into a temporary folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} version=${PYTHON_VERSION:-3.12}
dali=
if [ "${1:-}" = --dali ]; then
  dali=1
  shift
fi
folder=${1:-.whl}

download() {
  local target=$1 platforms=()
  shift
  for glibc in 28 27 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --disable-pip-version-check --implementation cp \
    --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform any -d "$target" "$@"
}

mkdir -p "$folder"
download "$folder" "omegaconf>=2.4" "simplejpeg>=1.8" "rich>=13.9" markdown-it-py mdurl
rm -f "$folder"/dali.tar.*
if [ -n "$dali" ]; then
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  download "$wheels" "nvidia-dali-cuda130>=2.2" "nvidia-nvimgcodec-cu13>=0.9,<0.10" "nvidia-nvjpeg>=13,<14" nvtx libcst \
    optree makefun gast astunparse six wheel
  (cd "$wheels" && sha256sum ./*.whl > SHA256SUMS)
  tar cf - -C "$wheels" . | split -b 55M -d - "$folder/dali.tar."
fi
du -sh "$folder"
