#!/usr/bin/env bash
# Measure a GPU in calls of at most 9 minutes, the most valuable first. One JSON file a suite, in $OUT (default
# benchmarks/results/DEVICE), written as results come.
#
#   benchmarks/run_gpu.sh A                7 min  this card's rates (peaks), then every GPU test of ops and training
#   benchmarks/run_gpu.sh B                8 min  ops, each backend: ViT-L, ViT-H, ViT-L at batch 64
#   benchmarks/run_gpu.sh C             2 x 9 min  whole steps of ViT-L and ViT-H, ours and all baselines; call it twice
#   benchmarks/run_gpu.sh D                6 min  loss parity, tokenizer, largest batches
#   benchmarks/run_gpu.sh E                9 min  data loading with DALI, masks, a step on real images
#   benchmarks/run_gpu.sh quick            3 min  some of A, B and C
#   benchmarks/run_gpu.sh --cpu-rehearsal  every suite at tiny sizes on a CPU; writes to a temporary folder
#
# The minutes are estimates for an H100, none was measured. A call that was ended, or had no time for a suite, goes on
# where it stopped when it is made again: results of the same source and device, in $OUT or benchmarks/results/DEVICE,
# are not measured again, unless --again follows. Compiled programs are kept in .compile_cache/. A suite that fails
# does not stop the others; the exit status is 1 then, and 2 where nothing could start.
#
# Needs no installation of the project and no network. Packages that the machine lacks: benchmarks/carry_wheels.sh fills
# .whl/ elsewhere, and wheels found in $WHEELS (default .whl) are installed into a temporary folder for the call.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET CAE_KERNELS
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl}
mode=${1:-none} again=${2:-} budget=520
needed=(torch triton numpy PIL safetensors matplotlib pytest omegaconf simplejpeg rich)
case $mode in
  A | B | C | D | quick) ;;
  E) needed+=(nvidia.dali) ;;
  --cpu-rehearsal) budget=2400; export CUDA_VISIBLE_DEVICES= ;;
  *) echo "run_gpu.sh: no call $mode; A, B, C, D, E, quick or --cpu-rehearsal" >&2; exit 2 ;;
esac
if [ -n "$again" ] && [ "$again" != --again ]; then
  echo "run_gpu.sh: no option $again; --again measures anew" >&2
  exit 2
fi

missing() {
  "$PYTHON" -c '
import importlib.util, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(*(name for name in sys.argv[1:] if not there(name)))' "${needed[@]}"
}

# Wheels as they are, or DALI as the pieces of one archive.
install_wheels() {
  local site
  site=$(mktemp -d)
  trap "rm -rf '$site'" EXIT
  mkdir "$site/wheels"
  cp "$WHEELS"/*.whl "$site/wheels" 2> /dev/null
  if [ "$mode" = E ] && [ -e "$WHEELS/dali.tar.00" ]; then
    cat "$WHEELS"/dali.tar.?? | tar xf - -C "$site/wheels" && (cd "$site/wheels" && sha256sum -c --quiet SHA256SUMS) || return
  fi
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --root-user-action ignore \
    --target "$site" "$site"/wheels/*.whl && export PYTHONPATH="$PYTHONPATH:$site"
}

lacking=$(missing) || exit 2
if [ -n "$lacking" ] && [ -d "$WHEELS" ]; then
  install_wheels
  lacking=$(missing)
fi
if [ -n "$lacking" ]; then
  option=
  [[ " $lacking " == *" nvidia.dali "* ]] && option=" --dali"
  echo "run_gpu.sh: missing ${lacking// /, }; where there is a network, benchmarks/carry_wheels.sh$option fills .whl/:" \
    "carry it here (WHEELS says where it is) and call again" >&2
  exit 2
fi

device=$("$PYTHON" -c 'from benchmarks.record import device_name, folder_name; print(folder_name(device_name()))') || exit 2
if [ "$mode" != --cpu-rehearsal ] && [ "$device" = cpu ]; then
  echo "run_gpu.sh: torch finds no CUDA GPU; --cpu-rehearsal runs tiny sizes on a CPU" >&2
  exit 2
fi
if [ "$mode" = --cpu-rehearsal ]; then
  OUT=${OUT:-$(mktemp -d)}
else
  OUT=${OUT:-benchmarks/results/$device}
  export TRITON_CACHE_DIR="$PWD/.compile_cache/triton" TORCHINDUCTOR_CACHE_DIR="$PWD/.compile_cache/inductor"
fi
mkdir -p "$OUT"
began=$SECONDS
failed=()

# suite NAME LIMIT COMMAND...: at most LIMIT seconds, and no more than is left of the budget
suite() {
  local name=$1 limit=$2 left=$((budget - SECONDS + began)) start=$SECONDS status
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 20 ]; then
    echo "== $name: not run, no time left; the same call goes on with it"
    failed+=("$name (not run)")
    return
  fi
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@"
  status=$?
  [ $status = 0 ] || failed+=("$name (status $status)")
  echo "== $name: $((SECONDS - start)) s, status $status"
}

# bench FILE LIMIT MODULE OPTIONS...: several may write to one file, each beside the rows of the others
bench() {
  local file=$1 limit=$2 module=$3
  shift 3
  if [ "$mode" != --cpu-rehearsal ] && [ ! -e "$OUT/$file.json" ] && [ -e "benchmarks/results/$device/$file.json" ]; then
    cp "benchmarks/results/$device/$file.json" "$OUT"
  fi
  suite "$file" "$limit" "$PYTHON" -m "benchmarks.$module" --json "$OUT/$file.json" ${again:+"$again"} "$@"
}

gpu_tests=(tests/kernels tests/training/test_inputs.py tests/training/test_monitor.py)
data_tests=(tests/data/test_backend.py tests/data/test_dali.py tests/data/test_loader.py)
images() { "$PYTHON" -c 'from benchmarks.loading.data_loading import make_images; print(make_images(512))'; }

case $mode in
  A)
    bench peaks 120 speed.peaks
    bench correctness 500 speed.correctness -- "${gpu_tests[@]}"
    ;;
  B)
    bench ops 400 speed.ops --shapes ViT-L --seconds 0.1
    bench ops 300 speed.ops --shapes ViT-H --seconds 0.1
    bench ops 200 speed.ops --shapes ViT-L --batches 64 --seconds 0.05
    ;;
  C)
    bench train_step 480 speed.train_step --models ViT-L --variants ours compiled --limit 400
    bench train_step 480 speed.train_step --models ViT-H --variants ours original --limit 150
    bench train_step 480 speed.train_step --models ViT-L --variants original reference ours-compiled ours-compiled-graphs \
      --limit 300
    bench train_step 480 speed.train_step --models ViT-H --variants compiled ours-compiled reference --limit 400
    ;;
  D)
    bench loss_parity 300 speed.loss_parity --seeds 2 --png "$OUT/loss_parity.png"
    bench tokenizer 60 speed.tokenizer
    bench train_step_largest 150 speed.train_step --models ViT-L ViT-H --variants ours --steps 5 --largest
    ;;
  E)
    bench correctness_data 120 speed.correctness -- "${data_tests[@]}"
    bench masks 60 loading.masks
    bench data_loading 300 loading.data_loading --workers 4 8 12 --repeats 2 --seconds 3 \
      --ways "PIL + torchvision DataLoader" ours "DALI GPU" "ours, DALI GPU"
    bench train_step_data 60 speed.train_step --models ViT-L --variants ours --steps 10 --data "$(images)"
    ;;
  quick)
    bench quick_peaks 50 speed.peaks --models ViT-L --seconds 0.03
    bench quick_correctness 60 speed.correctness -- tests/kernels/test_attention.py tests/kernels/test_residual_norm.py
    bench quick_step 60 speed.train_step --models ViT-L --variants ours original --steps 10
    bench quick_ops 40 speed.ops --shapes ViT-L --seconds 0.05 -k attention
    ;;
  --cpu-rehearsal)
    bench peaks 60 speed.peaks --models tiny --seconds 0.01
    bench correctness 120 speed.correctness -- "${gpu_tests[@]}"
    bench ops 200 speed.ops --seconds 0.01 -k layer_norm
    bench train_step 1500 speed.train_step --tiny --batch 2 --steps 2
    bench loss_parity 120 speed.loss_parity --steps 10 --png "$OUT/loss_parity.png"
    bench tokenizer 60 speed.tokenizer --batch 2 --grid 4 --width 8 --steps 2
    bench correctness_data 60 speed.correctness -- "${data_tests[@]}"
    bench masks 60 loading.masks --repeats 1
    bench data_loading 200 loading.data_loading --workers 1 --repeats 1 --seconds 0.2 --images 16 \
      --ways "PIL + torchvision DataLoader" ours "DALI GPU" "ours, DALI GPU"
    bench train_step_data 120 speed.train_step --tiny --variants ours --batch 2 --steps 2 --data bundled:photographs
    ;;
esac
echo "results: $OUT ($((SECONDS - began)) s)"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
