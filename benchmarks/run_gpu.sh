#!/usr/bin/env bash
# Builds, tests and measures this checkout on one GPU: most important first, without a network. A call ends within nine
# minutes; what it did not come to is done by calling it again.
#
#   benchmarks/run_gpu.sh [--dry-run] [OUT]
#
# OUT, by default runs/gpu, gets a log for every part, JUnit files, summary.json, and results with their report. A part that
# passes leaves OUT/<part>.done and is skipped the next time: after a change of code, take another OUT. A part that fails or
# outlasts its limit does not stop the later ones. Exit code: 0 if all parts passed, 1 if not, 2 for a mistake in the call.
#
# --dry-run needs no GPU: nothing is built, and tests and benchmarks are collected but not run.
# PYTHON is the interpreter, by default python3; it needs what pyproject.toml names, and pytest and pytest-benchmark.
set -u

readonly TOTAL=535 # seconds; every part has a limit of its own too

mistake() {
    echo "error: $1" >&2
    exit 2
}

ROOT=$(cd "$(dirname "$0")/.." && pwd)
DRY_RUN=false
OUT=
for argument in "$@"; do
    case $argument in
    --dry-run) DRY_RUN=true ;;
    -*) mistake "the option $argument is unknown; expected benchmarks/run_gpu.sh [--dry-run] [OUT]" ;;
    *)
        if [[ -n $OUT ]]; then mistake "two folders are given, $OUT and $argument; expected one"; fi
        OUT=$argument
        ;;
    esac
done
PYTHON=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || mistake "PYTHON is no interpreter; set it to one"
if ! $DRY_RUN && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    mistake "torch finds no GPU here; pass --dry-run to prove paths and options alone"
fi
OUT=${OUT:-$ROOT/runs/gpu}
if ! mkdir -p "$OUT"; then mistake "OUT is $OUT, which cannot be made; expected a folder"; fi
OUT=$(cd "$OUT" && pwd)
cd "$ROOT" || exit 2

COMMIT=unknown
CHANGED=null
if git rev-parse HEAD >/dev/null 2>&1; then
    COMMIT=$(git rev-parse HEAD)
    CHANGED=$(git status --porcelain |
        "$PYTHON" -c 'import json, sys; print(json.dumps([line[3:] for line in sys.stdin.read().splitlines()]))')
fi
rows=()
failures=0

# What is known so far, should the machine be taken away.
write_summary() {
    local IFS=,
    printf '{"commit": "%s", "changed_files": %s, "dry_run": %s, "seconds": %d, "parts": [%s]}\n' \
        "$COMMIT" "$CHANGED" "$DRY_RUN" "$SECONDS" "${rows[*]}" >"$OUT/summary.json"
}

# part NAME LIMIT COMMAND...: the limit in seconds.
part() {
    local name=$1 limit=$2 started=$SECONDS left=$((TOTAL - SECONDS)) outcome seconds row
    local mark=$OUT/$name.done log=$OUT/$name.log
    shift 2
    if grep -qs "\"dry_run\": $DRY_RUN" "$mark"; then
        rows+=("$(<"$mark")")
        printf '%-14s    - s  passed before\n' "$name"
        write_summary
        return
    fi
    if ((left <= 0)); then
        outcome="not started"
    else
        # An interrupt, which lets pytest write what it has.
        timeout --signal=INT --kill-after=5 $((limit < left ? limit : left)) "$@" >"$log" 2>&1 </dev/null
        case $? in
        0) outcome=passed ;;
        124 | 137) outcome="timed out" ;;
        *) outcome=failed ;;
        esac
    fi
    seconds=$((SECONDS - started))
    printf -v row '{"part": "%s", "seconds": %d, "outcome": "%s", "commit": "%s", "dry_run": %s}' \
        "$name" "$seconds" "$outcome" "$COMMIT" "$DRY_RUN"
    rows+=("$row")
    if [[ $outcome == passed ]]; then
        echo "$row" >"$mark"
        printf '%-14s %4d s  passed\n' "$name" "$seconds"
    else
        failures=$((failures + 1))
        printf '%-14s %4d s  %s, see %s\n' "$name" "$seconds" "$outcome" "$log"
    fi
    write_summary
}

run_pytest=("$PYTHON" -m pytest -q)
build=("$PYTHON" -m pip install --no-build-isolation --no-deps -e .)
budget=("$PYTHON" -m benchmarks.budget_run "--results=$OUT/results")
if $DRY_RUN; then
    run_pytest+=(--collect-only)
    build=("$PYTHON" -c 'import selfnpo_kernels._C')
    budget=("$PYTHON" -m benchmarks.budget_run --help)
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# NAME LIMIT ARGUMENTS... of tests, NAME LIMIT FILE ARGUMENTS... of benchmarks
test_part() { part "$1" "$2" "${run_pytest[@]}" "--junitxml=$OUT/$1.xml" "${@:3}"; }
bench_part() { part "$1" "$2" "${run_pytest[@]}" --benchmark-only "benchmarks/$3.py" "--results=$OUT/results" "${@:4}"; }

part build 60 "${build[@]}"
part env 20 "$PYTHON" -m selfnpo.env
if command -v nvidia-smi >/dev/null; then timeout 20 nvidia-smi -q >"$OUT/nvidia-smi.txt" 2>&1; fi
test_part kernels 80 -m gpu tests/kernels
test_part steps 100 -m gpu tests/gpu
bench_part ladder 240 bench_ladder
bench_part ops 60 bench_ops
bench_part hours-sd15 120 bench_hours -k SD1.5
part budget 400 "${budget[@]}"
bench_part guidance 60 bench_guidance
bench_part tandem 200 bench_tandem
bench_part scaling 150 bench_scaling
bench_part hours-sdxl 300 bench_hours -k SDXL
bench_part hours-video 400 bench_hours -k CogVideoX
test_part kernels-all "$TOTAL" tests/kernels # with the time that the others left

exit $((failures > 0))
