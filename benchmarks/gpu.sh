#!/usr/bin/env bash
# Test the ops on a GPU, look for accesses beyond memory and for races, time everything, and learn; without a network.
#
#     benchmarks/gpu.sh                                  every stage
#     benchmarks/gpu.sh tests                            the tests of triton_ops, on the device
#     benchmarks/gpu.sh sanitize                         every op at small shapes under compute-sanitizer
#     benchmarks/gpu.sh ops                              ssl bench ops --shapes full
#     benchmarks/gpu.sh ops:clip_loss,nt_xent tests:contrast     some ops, and tests whose file's name has this in it
#     benchmarks/gpu.sh steps                            whole steps of training beside transformers, timm and lightly
#     benchmarks/gpu.sh learn                            runs of minutes through ssl train and ssl eval
#     benchmarks/gpu.sh steps:bert,gpt learn:gpt         some of them
#     benchmarks/gpu.sh --dry-run                        every stage in little on this machine, without a GPU
#
#     --wheels FOLDER   wheels to install beside what there is; default: .whl here, if it exists
#     --data FOLDER     data sets that `learn` names, each in its own folder; default: .data here
#     --limit SECONDS   of the whole call; default 560. What a stage has found by then is kept.
#
# Python 3.11 or later with torch and triton must be there. Results go to $OUT, or to benchmarks/results/DATE-DEVICE:
# about.json, tests.xml, ops.json, ops.png, steps.json, learn.json, and gpu.log with what every stage printed. $COMMIT
# names the commit where git cannot.
# No setting of the device is touched. Exits with 1 if any stage found something wrong, after all have run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
command_line="benchmarks/gpu.sh $*"
python=${PYTHON:-python3}
dry='' wheels=.whl data=.data limit=560 stages=() all=(tests sanitize ops steps learn)

while (($#)); do
    case $1 in
        --dry-run) dry=1 ;;
        --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
        --data) data=${2:?--data needs a folder} && shift ;;
        --limit) limit=${2:?--limit needs seconds} && shift ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' benchmarks/gpu.sh && exit ;;
        tests | tests:* | sanitize | ops | ops:* | steps | steps:* | learn | learn:*) stages+=("$1") ;;
        *) echo "gpu.sh: there is no stage or option '$1'; stages are ${all[*]}" >&2 && exit 2 ;;
    esac
    shift
done
((${#stages[@]})) || stages=("${all[@]}")

PATH=$PATH:/usr/local/cuda/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A tree of links in place of an installation, which would want a build system: each folder under its package's name,
# and the metadata that entry points are found by.
site() {
    "$python" - "$work/site" <<'PYTHON'
import sys, tomllib
from pathlib import Path

site, root = Path(sys.argv[1]), Path.cwd()
about = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
for package, folder in about["tool"]["setuptools"]["package-dir"].items():
    place = site.joinpath(*package.split("."))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(root / folder)
project = about["project"]
info = site / f"{project['name']}-{project['version']}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
groups = {"console_scripts": project["scripts"], **project["entry-points"]}
lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
(info / "entry_points.txt").write_text("\n".join(lines))
PYTHON
}

# One by one, so that a wheel of another platform keeps no other out.
install() {
    local wheel
    for wheel in "$wheels"/*.whl; do
        [[ -e $wheel ]] || { echo "no wheels in $wheels" && return; }
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
            --root-user-action=ignore --upgrade --target "$work/wheels" "$wheel" 2>"$work/pip" || tail -n 1 "$work/pip"
    done
}

about() {
    COMMAND=$command_line "$python" - "$out/about.json" "$dry" <<'PYTHON'
import json, os, platform, subprocess, sys
from datetime import datetime, timezone
from importlib.metadata import distributions

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

import torch

gpu = torch.cuda.is_available()
wanted = ("torch", "triton", "numpy", "pytest", "nvidia-", "liger", "quack", "memeff", "inf-cl", "inf_cl", "cut-cross",
          "cut_cross", "kornia", "xformers", "transformers", "timm", "lightly", "tokenizers", "pydantic", "hypothesis")
found = {d.metadata["Name"]: d.version for d in distributions() if (d.metadata["Name"] or "").lower().startswith(wanted)}
query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
about = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "command": os.environ["COMMAND"],
    "dry_run": bool(sys.argv[2]),
    "commit": os.environ.get("COMMIT") or said("git", "rev-parse", "HEAD"),
    "changed": said("git", "status", "--porcelain"),
    "device": torch.cuda.get_device_name() if gpu else None,
    "nvidia_smi": said("nvidia-smi", query, "--format=csv,noheader") if gpu else None,
    "cuda": torch.version.cuda,
    "python": platform.python_version(),
    "platform": platform.platform(),
    "versions": dict(sorted(found.items())),
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(about, file, indent=1)
print(about["device"] or "no GPU", "torch", torch.__version__, "commit", about["commit"])
PYTHON
}

left() { echo $((limit - SECONDS)); }

# within SHARE COMMAND...: stopped politely once that share, in percent, of the time left is over, so that it can write
# what it has.
within() {
    local seconds=$(($(left) * $1 / 100))
    shift
    ((seconds >= 5)) || { echo "no time left for: $*" && return 1; }
    timeout --signal=INT --kill-after=20 "$seconds" "$@"
}

# kept: what a stage prints, on the terminal and, the last 3 MB of it, in gpu.log.
kept() {
    tee "$work/said"
    { echo "=== $stage" && tail -c 3000000 "$work/said"; } >>"$out/gpu.log"
}

# Warnings are errors but for those of fill-with-NaN, which asks torch for determinism and is told where there is none.
run_tests() {
    local files=(tests/triton_ops) more=() seconds
    [[ $1 ]] && files=(tests/triton_ops/test_*"$1"*.py)
    [[ $dry && ! $1 ]] && files=(tests/triton_ops/test_philox.py)
    "$python" -c 'import xdist' 2>/dev/null && [[ ! $dry ]] && more+=(-n 6)
    within 90 env ${dry:+TRITON_INTERPRET=1} CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest -q --no-header \
        -p no:cacheprovider --continue-on-collection-errors "${more[@]}" -o $'filterwarnings=error\nignore:(?i).*determinis' \
        --junitxml="$out/tests.xml" "${files[@]}" 2>&1 | kept
}

run_sanitize() {
    command -v compute-sanitizer >/dev/null || [[ $dry ]] || { echo "compute-sanitizer is not installed" && return 1; }
    {
        watch memcheck 45
        local first=$?
        watch racecheck 90 && ((!first))
    } 2>&1 | kept
}

# watch TOOL SHARE: every op at small shapes under a tool; each allocation is one of the device, so that its end is seen.
watch() {
    local watched=(compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20) names=()
    [[ $dry ]] && watched=() names=(random_bits)
    echo "== $1"
    within "$2" env ${dry:+TRITON_INTERPRET=1} PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${watched[@]}" "$python" -m selfsup.cli \
        bench ops "${names[@]}" --shapes small --peers none --check-only --limit "$(($(left) * $2 / 120))"
}

run_ops() {
    local names=()
    IFS=, read -ra names <<<"$1"
    [[ $dry && ! $1 ]] && names=(random_bits)
    local options=(--shapes full --device cuda)
    [[ $dry ]] && options=(--shapes small --device cpu --rounds 3 --seconds 0.2)
    within 95 "$python" -m selfsup.cli bench ops "${names[@]}" "${options[@]}" --limit "$(($(left) * 8 / 10))" \
        --out "$out" 2>&1 | kept
}

run_steps() {
    local names=()
    IFS=, read -ra names <<<"$1"
    [[ $dry && ! $1 ]] && names=(gpt)
    local place=cuda
    [[ $dry ]] && place=cpu
    within 97 "$python" benchmarks/steps.py "${names[@]}" --device "$place" \
        --limit "$(($(left) * 9 / 10))" --out "$out" 2>&1 | kept
}

run_learn() {
    local names=()
    IFS=, read -ra names <<<"$1"
    [[ $dry && ! $1 ]] && names=(gpt)
    within 97 "$python" benchmarks/learn.py "${names[@]}" --data "$data" ${dry:+--little} \
        --limit "$(($(left) * 9 / 10))" --out "$out" 2>&1 | kept
}

install
site || exit 2
export PYTHONPATH=$work/site:$work/wheels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")') || exit 2
[[ $device != cpu || $dry ]] || { echo "gpu.sh: torch sees no GPU here; --dry-run works without one" >&2 && exit 2; }
out=${OUT:-benchmarks/results/$(date +%Y-%m-%d)-$(tr -cs 'a-zA-Z0-9\n' - <<<"${device,,}")}
mkdir -p "$out" && out=$(cd "$out" && pwd)
about || exit 2

failed=()
for stage in "${stages[@]}"; do
    echo "=== $stage, $(left) s left"
    name=${stage%%:*} part=
    [[ $stage == *:* ]] && part=${stage#*:}
    "run_$name" "$part" || failed+=("$stage")
done
echo "=== written to $out: $(ls "$out" | tr '\n' ' ')"
((${#failed[@]})) && echo "=== FAILED: ${failed[*]}" && exit 1
echo "=== all is well"
