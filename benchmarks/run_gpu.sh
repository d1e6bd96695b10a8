#!/usr/bin/env bash
# Measure a GPU: correctness first, then steps, loss parity, ops, tokenizer. One JSON file a suite, in $OUT (default
# benchmarks/results/DEVICE); files are written as results come, so that a suite cut short leaves what it had.
#
#   benchmarks/run_gpu.sh                  every suite, in less than 9 minutes on an H100
#   benchmarks/run_gpu.sh --rest           9 minutes more: other shapes and batches, torch.compile, largest batches
#   benchmarks/run_gpu.sh --quick          2 minutes: some kernels, ViT-L, ours against the original
#   benchmarks/run_gpu.sh --data           data loading with DALI, which must be installed, and masks; 9 minutes
#   benchmarks/run_gpu.sh --cpu-rehearsal  the same code at tiny sizes on a CPU; writes to a temporary folder
#
# A suite that fails or runs out of time does not stop the others; the exit status is 1 then. Needs no installation of
# the project and no network.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET CAE_KERNELS
PYTHON=${PYTHON:-python3}
mode=${1:-full}
case $mode in
  full | --rest) budget=530 ;;
  --quick) budget=118 ;;
  --data) budget=530 ;;
  --cpu-rehearsal) budget=900; export CUDA_VISIBLE_DEVICES= ; OUT=${OUT:-$(mktemp -d)} ;;
  *) echo "run_gpu.sh: no option $mode; --rest, --quick, --data or --cpu-rehearsal" >&2; exit 2 ;;
esac
device=$("$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); from record import *; print(folder_name(device_name()))') || exit 1
if [ "$mode" != --cpu-rehearsal ] && [ "$device" = cpu ]; then
  echo "run_gpu.sh: torch finds no CUDA GPU; --cpu-rehearsal runs tiny sizes on a CPU" >&2
  exit 2
fi
OUT=${OUT:-benchmarks/results/$device}
mkdir -p "$OUT"
began=$SECONDS
failed=()

# suite NAME LIMIT COMMAND...: at most LIMIT seconds, and no more than is left of the budget
suite() {
  local name=$1 limit=$2 left=$((budget - SECONDS + began)) start=$SECONDS status
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    echo "== $name: not run, no time left"
    failed+=("$name (not run)")
    return
  fi
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@"
  status=$?
  [ $status = 0 ] || failed+=("$name (status $status)")
  echo "== $name: $((SECONDS - start)) s, status $status"
}

bench() { local name=$1 limit=$2 script=$3; shift 3; suite "$name" "$limit" "$PYTHON" "benchmarks/$script" --json "$OUT/$name.json" "$@"; }

case $mode in
  full)
    bench correctness 120 correctness.py -- tests/kernels
    bench train_step 200 train_step.py --models ViT-L --variants ours original reference compiled --limit 110
    bench loss_parity 80 loss_parity.py --seeds 2 --png "$OUT/loss_parity.png"
    bench tokenizer 30 tokenizer.py
    bench ops 110 ops.py --shapes ViT-L --seconds 0.1
    bench train_step_more 150 train_step.py --models ViT-H ViT-B --variants ours original reference --steps 10
    images=$("$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); from data_loading import *; print(make_images(512))')
    bench train_step_data 60 train_step.py --models ViT-L --variants ours --steps 10 --data "$images"
    ;;
  --rest)
    bench train_step_compiled 170 train_step.py --models ViT-H --variants ours compiled --steps 10 --limit 140
    bench ops_more 130 ops.py --shapes ViT-H ViT-B --seconds 0.05
    bench ops_batches 70 ops.py --shapes ViT-L --batches 64 --seconds 0.05
    bench train_step_largest 150 train_step.py --models ViT-L ViT-H --variants ours original --steps 5 --largest
    ;;
  --quick)
    bench correctness 45 correctness.py -- tests/kernels -x -k "attention or residual"
    bench train_step 55 train_step.py --models ViT-L --variants ours original --steps 10
    bench ops 25 ops.py --shapes ViT-L --seconds 0.05 -k attention
    ;;
  --data)
    bench correctness_data 150 correctness.py -- tests/data
    bench masks 60 masks.py
    bench data_loading 320 data_loading.py --workers 4 8 12 --repeats 2 --seconds 3 \
      --ways "PIL + torchvision DataLoader" ours "DALI GPU" "ours, DALI GPU"
    ;;
  --cpu-rehearsal)
    bench correctness 60 correctness.py -- tests/kernels/test_linear_gelu.py tests/kernels/test_attention.py
    bench train_step 300 train_step.py --tiny --batch 2 --steps 2
    bench loss_parity 60 loss_parity.py --steps 10 --png "$OUT/loss_parity.png"
    bench tokenizer 30 tokenizer.py --batch 2 --grid 4 --width 8 --steps 2
    bench ops 120 ops.py --seconds 0.01 -k layer_norm
    ;;
esac
echo "results: $OUT ($((SECONDS - began)) s)"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
