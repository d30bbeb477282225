# Sourced by sft_lora.sh: how to start the training on this machine.
#
#   choose_launch   reads NPROC, USE_DEEPSPEED and ZERO_STAGE, says what it chose and why, and sets
#                   LAUNCH (the words before sft_lora.py) and LAUNCH_ARGS (the words after it).

count_gpus() {
    "$PYTHON" - <<'PY'
import shutil, subprocess
# asking the driver takes no torch import; no driver, no GPU
tool = shutil.which("nvidia-smi")
out = subprocess.run([tool, "-L"], capture_output=True, text=True).stdout if tool else ""
print(sum(line.startswith("GPU ") for line in out.splitlines()))
PY
}

choose_launch() {
    local gpus
    gpus=$(count_gpus)
    [[ $NPROC == auto || $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC: expected auto or a number"
    [[ $ZERO_STAGE =~ ^[0-3]$ ]] || fail "ZERO_STAGE=$ZERO_STAGE: expected 0, 1, 2 or 3"
    [[ $USE_DEEPSPEED =~ ^(auto|0|1)$ ]] || fail "USE_DEEPSPEED=$USE_DEEPSPEED: expected auto, 0 or 1"
    if ((gpus == 0)); then
        launch_on_cpu
    else
        launch_on_gpus "$gpus"
    fi
    echo "launch: $WHY" >&2
    echo "launch: ${LAUNCH[*]} sft_lora.py ... ${LAUNCH_ARGS[*]}" >&2
}

launch_on_cpu() {
    [[ $USE_DEEPSPEED != 1 ]] || fail "USE_DEEPSPEED=1: no GPU was found; leave it at auto to train on the CPU"
    [[ $NPROC == auto || $NPROC == 1 ]] || fail "NPROC=$NPROC: no GPU was found, and a CPU trains in one process"
    WHY="no GPU found, so one process on the CPU, without DeepSpeed"
    LAUNCH=("$PYTHON")
    LAUNCH_ARGS=(--use_cpu True)
    export DS_ACCELERATOR=cpu # DeepSpeed is not used, but some libraries look at it
}

launch_on_gpus() {
    local number=$1
    [[ $NPROC == auto ]] || number=$NPROC
    ((number <= $1)) || fail "NPROC=$number: only $1 GPU(s) were found"
    LAUNCH=("$PYTHON" -m accelerate.commands.launch --num_processes "$number" --num_machines 1
        --mixed_precision no --dynamo_backend no)
    LAUNCH_ARGS=()
    if [[ $USE_DEEPSPEED == 0 ]]; then
        WHY="$1 GPU(s) found, so $number process(es) with accelerate, DeepSpeed turned off"
        ((number == 1)) || LAUNCH+=(--multi_gpu)
    else
        WHY="$1 GPU(s) found, so $number process(es) with accelerate and DeepSpeed ZeRO-$ZERO_STAGE"
        LAUNCH+=(--use_deepspeed --deepspeed_config_file "configs/zero$ZERO_STAGE.json")
    fi
}
