#!/usr/bin/env bash
# Builds, tests and measures this checkout on one GPU: most important first, without a network. A call ends within ten
# minutes; what it did not come to is done by calling it again. docs/benchmarks.md has the commands to copy.
#
#   benchmarks/run_gpu.sh [--dry-run] [OUT [PART...]]
#
# OUT, by default runs, gets two files, both written anew after every part: gpu.tgz with logs, results and reports, and
# summary.json. A part that passes is skipped the next time, until the commit changes. One that fails or outlasts its limit
# does not stop the later ones, and the end of its log is printed. PART...: only these, and what builds.
# Exit code: 0 if all parts passed, 1 if not, 2 for a mistake in the call.
#
# --dry-run needs no GPU: nothing is built, and tests and benchmarks are collected but not run.
#
# PYTHON          the interpreter, by default python3; it needs what pyproject.toml names, pytest, pytest-benchmark and
#                 pytest-xdist
# WHEELS          a folder of wheels to install first, for this script alone
# WORK            the working folder, by default runs/gpu
# EARLIER         a gpu.tgz to go on from, where WORK is new
# SELFNPO_COMMIT  what is measured, where git does not know it; see benchmarks/results.py
set -u

# part        expected  limit, in seconds; expected on an H100, by estimate. A part begins where half of it is left.
readonly PARTS='
wheels              10     60
build               40     75
env                 10     40
warm                90    200
tests              110    140
ladder             250    320
ops                 85    110
budget             330    540
hours-sd15          60    120
guidance            30     60
tandem              90    200
scaling             80    150
hours-sdxl         150    300
hours-video        150    300
kernels-all        300    540
'
readonly TOTAL=545  # seconds, of all parts
readonly GRACE=15   # for a part to save what it has after an interrupt
readonly STORING=90 # of its time, for a whole run to write its last checkpoint and report

# of NAME FIELD: 1 the name, 2 expected, 3 limit
of() { awk -v name="$1" -v field="$2" '$1 == name { print $field }' <<<"$PARTS"; }

mistake() {
    echo "error: $1" >&2
    exit 2
}

ROOT=$(cd "$(dirname "$0")/.." && pwd)
DRY_RUN=false
words=()
for argument in "$@"; do
    case $argument in
    --dry-run) DRY_RUN=true ;;
    -*) mistake "the option $argument is unknown; expected benchmarks/run_gpu.sh [--dry-run] [OUT [PART...]]" ;;
    *) words+=("$argument") ;;
    esac
done
OUT=${words[0]:-$ROOT/runs}
wanted=" wheels build ${words[*]:1} "
for name in "${words[@]:1}"; do
    if [[ -z $(of "$name" 1) ]]; then mistake "there is no part $name; expected $(awk '{ print $1 }' <<<"$PARTS" | xargs)"; fi
done
PYTHON=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || mistake "PYTHON is no interpreter; set it to one"
if ! $DRY_RUN && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    mistake "torch finds no GPU here; pass --dry-run to prove paths and options alone"
fi
if [[ -n ${WHEELS:-} ]] && ! compgen -G "$WHEELS/*.whl" >/dev/null; then mistake "WHEELS is $WHEELS, which has no wheels"; fi
WORK=${WORK:-$ROOT/runs/gpu}
for folder in "$OUT" "$WORK"; do
    if ! mkdir -p "$folder"; then mistake "$folder cannot be made; expected a folder"; fi
done
OUT=$(cd "$OUT" && pwd -P)
WORK=$(cd "$WORK" && pwd -P)
if [[ -n ${EARLIER:-} && -z $(ls -A "$WORK") ]] && ! tar xzf "$EARLIER" -C "$WORK" --strip-components=1; then
    mistake "EARLIER is $EARLIER, which cannot be unpacked; expected a gpu.tgz"
fi
WHEELS=${WHEELS:+$(cd "${WHEELS:-.}" && pwd)}
cd "$ROOT" || exit 2

if [[ ${SELFNPO_COMMIT:-none} == *[!0-9A-Za-z._-]* ]]; then mistake "SELFNPO_COMMIT is $SELFNPO_COMMIT; expected a hash"; fi
COMMIT=${SELFNPO_COMMIT:-$(git describe --always --abbrev=40 --exclude='*' --dirty=-changed 2>/dev/null || echo unknown)}
export CI=true # so that pytest cuts no reason short
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
rows=()
failures=0

# What is known so far, should the machine be taken away.
save() {
    local IFS=,
    saved=true
    printf '{"commit": "%s", "dry_run": %s, "seconds": %d, "parts": [%s]}\n' \
        "$COMMIT" "$DRY_RUN" "$SECONDS" "${rows[*]}" >"$OUT/summary.json" || saved=false
    # Without what belongs to this machine. Code 1: a part in the background wrote to its log meanwhile.
    tar czf "$OUT/.gpu.tgz" -C "${WORK%/*}/" --warning=no-file-changed --anchored --exclude="${WORK##*/}"/{site,warm} \
        --exclude="${WORK##*/}"/{wheels,build,env}.done --no-anchored --exclude='*.tgz' "${WORK##*/}"
    if (($? > 1)) || ! mv -T "$OUT/.gpu.tgz" "$OUT/gpu.tgz"; then saved=false; fi
}

# What may be spent on part NAME.
allowed() {
    local limit left=$((TOTAL - SECONDS))
    limit=$(of "$1" 3)
    echo $((limit < left ? limit : left))
}

is_wanted() { [[ ${#words[@]} -lt 2 || $wanted == *" $1 "* ]]; }
is_done() { grep -qsF "\"commit\": \"$COMMIT\", \"dry_run\": $DRY_RUN" "$WORK/$1.done"; }

# begin SECONDS NAME COMMAND...: in the background, into the part's log, with an interrupt at the end, which lets it write
# what it has. `timeout` is in a process group of its own, so a Ctrl-C reaches it through the trap below alone.
begin() { timeout --signal=INT --kill-after="$GRACE" "$1" "${@:3}" >"$WORK/$2.log" 2>&1 </dev/null & }
running=
warming=
give_up() {
    kill -INT $running $warming 2>/dev/null
    wait
    save
    echo "interrupted; what is known so far: $OUT/gpu.tgz" >&2
    exit 130
}
trap give_up INT TERM

# ended NAME SECONDS CODE
ended() {
    local row outcome lines=15
    case $3 in
    0) outcome=passed ;;
    75) outcome=unfinished ;; # of a whole run: the next call does the rest
    124 | 137) outcome="timed out" ;;
    none) outcome="not started" ;;
    *) outcome=failed ;;
    esac
    printf -v row '{"part": "%s", "seconds": %d, "outcome": "%s", "commit": "%s", "dry_run": %s}' \
        "$1" "$2" "$outcome" "$COMMIT" "$DRY_RUN"
    rows+=("$row")
    printf '%-12s %4d s  %s\n' "$1" "$2" "$outcome"
    if [[ $outcome == passed ]]; then
        echo "$row" >"$WORK/$1.done"
    else
        failures=$((failures + 1))
        case $1 in tests | ladder) lines=60 ;; esac
        if [[ $3 != none ]]; then tail -n "$lines" "$WORK/$1.log" | sed 's/^/    /'; fi
    fi
    save
}

# part NAME COMMAND...
part() {
    local started=$SECONDS code=0
    if ! is_wanted "$1"; then return; fi
    if is_done "$1"; then
        rows+=("$(<"$WORK/$1.done")")
        printf '%-12s    - s  passed before\n' "$1"
    elif ((2 * (TOTAL - SECONDS) < $(of "$1" 2))); then
        ended "$1" 0 none
    else
        begin "$(allowed "$1")" "$@"
        running=$!
        wait "$running" || code=$?
        running=
        ended "$1" $((SECONDS - started)) "$code"
    fi
}

pytest=("$PYTHON" -m pytest -q)
wheels=("$PYTHON" -m pip install --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site")
build=("$PYTHON" -m pip install --no-build-isolation --no-deps -e .)
budget=("$PYTHON" -m benchmarks.budget_run)
if $DRY_RUN; then
    pytest+=(--collect-only)
    wheels=(ls)
    build=("$PYTHON" -c 'import selfnpo_kernels._C')
    budget+=(--help)
fi
# NAME ARGUMENTS... of tests, NAME FILE ARGUMENTS... of benchmarks
test_part() { part "$1" "${pytest[@]}" -n 8 "--junitxml=$WORK/$1.xml" "${@:2}"; }
bench_part() { part "$1" "${pytest[@]}" -s -rs --benchmark-only "benchmarks/$2.py" "--results=$WORK/results" "${@:3}"; }

if [[ -n $WHEELS ]]; then part wheels "${wheels[@]}" "$WHEELS"/*.whl; fi
part build "${build[@]}"
part env "$PYTHON" -m selfnpo.env
if command -v nvidia-smi >/dev/null; then timeout 20 nvidia-smi -q >"$WORK/nvidia-smi.txt" 2>&1; fi
if is_wanted warm && ! is_done tests; then # a few compiled steps fill Inductor's cache while the tests run
    warm_started=$SECONDS
    begin "$(of warm 3)" warm "${budget[@]}" --max_train_steps 12 "--results=$WORK/warm"
    warming=$!
fi
test_part tests -m gpu tests/kernels tests/gpu
if [[ -n $warming ]]; then
    code=0
    wait "$warming" || code=$?
    warming=
    ended warm $((SECONDS - warm_started)) "$code"
fi
bench_part ladder bench_ladder
bench_part ops bench_ops
part budget "${budget[@]}" "--max_seconds=$(($(allowed budget) - STORING))" "--results=$WORK/results"
bench_part hours-sd15 bench_hours -k SD1.5
bench_part guidance bench_guidance
bench_part tandem bench_tandem
bench_part scaling bench_scaling
bench_part hours-sdxl bench_hours -k SDXL
bench_part hours-video bench_hours -k CogVideoX
test_part kernels-all tests/kernels # with the time that the others left

save
if ! $saved; then
    echo "error: $OUT/gpu.tgz and summary.json could not all be written; the results are in $WORK" >&2
    exit 1
fi
echo "results: $OUT/gpu.tgz"
exit $((failures > 0))
