# Sourced by sft_lora.sh: how to start the training on this machine, or on this one of several.
#
#   choose_launch "$@"   reads the variables of the section "Launch", says what it chose and why,
#                        and sets LAUNCH (the words before sft_lora.py) and LAUNCH_ARGS (after it).
#
# Where something is missing it steps down: DeepSpeed -> DDP -> one process.  What you asked for by
# name (NPROC=2, USE_DEEPSPEED=1, ...) is never replaced: then it stops and says what is missing.
# The plan is exported as TINYLLM_LAUNCH, and every process checks that it became true.

choose_launch() {
    check_variables
    find_nodes
    find_devices
    choose_engine
    choose_precision "$*"
    build_command
    export TINYLLM_LAUNCH="processes=$PROCESSES device=$DEVICE_FOUND engine=$ENGINE"
    [[ $ENGINE != deepspeed ]] || TINYLLM_LAUNCH+=" zero=$STAGE"
    [[ -z $DTYPE ]] || TINYLLM_LAUNCH+=" dtype=$DTYPE"
    echo "launch: $WHY" >&2
}

check_variables() {
    [[ $DEVICE =~ ^(auto|cpu|gpu)$ ]] || fail "DEVICE=$DEVICE: expected auto, cpu or gpu"
    [[ $NPROC =~ ^(auto|[1-9][0-9]*)$ ]] || fail "NPROC=$NPROC: expected auto or a number"
    [[ $USE_DEEPSPEED =~ ^(auto|0|1)$ ]] || fail "USE_DEEPSPEED=$USE_DEEPSPEED: expected auto, 0 or 1"
    [[ $ZERO_STAGE =~ ^(auto|[0-3])$ ]] || fail "ZERO_STAGE=$ZERO_STAGE: expected 0, 1, 2 or 3"
    [[ $OFFLOAD =~ ^[01]$ ]] || fail "OFFLOAD=$OFFLOAD: expected 0 or 1"
    [[ $PRECISION =~ ^(auto|bf16|fp16|fp32)$ ]] ||
        fail "PRECISION=$PRECISION: expected auto, bf16, fp16 or fp32"
    [[ $OFFLOAD == 0 || ! $ZERO_STAGE =~ [01] ]] ||
        fail "OFFLOAD=1 goes with ZERO_STAGE=2 or 3, not with $ZERO_STAGE"
    # a stage or offloading is a wish for DeepSpeed
    if [[ $ZERO_STAGE != auto || $OFFLOAD == 1 ]]; then
        [[ $USE_DEEPSPEED != 0 ]] || fail "ZERO_STAGE and OFFLOAD need DeepSpeed; leave out USE_DEEPSPEED=0"
        USE_DEEPSPEED=1
    fi
    STAGE=${ZERO_STAGE/auto/2}
}

# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: given, or read from a SLURM step with one task a node.
find_nodes() {
    [[ ${WORLD_SIZE:-1} == 1 ]] ||
        fail "WORLD_SIZE=$WORLD_SIZE is set, but this script starts the processes itself: use NPROC and NNODES, and unset WORLD_SIZE and RANK"
    if [[ -z ${NNODES:-} && ${SLURM_NNODES:-1} -gt 1 ]]; then
        [[ ${SLURM_STEP_NUM_TASKS:-1} == "$SLURM_NNODES" ]] ||
            fail "this SLURM job has $SLURM_NNODES nodes: start one task on each with srun --ntasks-per-node=1 ./script/sft_lora.sh (or set NNODES=1 to use this node alone)"
        NNODES=$SLURM_NNODES
        NODE_RANK=$SLURM_NODEID
        [[ -n ${MASTER_ADDR:-} ]] ||
            read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || true
        MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 20000))} # another for every job
    fi
    NNODES=${NNODES:-1}
    NODE_RANK=${NODE_RANK:-0}
    [[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$NNODES: expected a number"
    [[ $NODE_RANK =~ ^[0-9]+$ ]] && ((NODE_RANK < NNODES)) ||
        fail "NODE_RANK=$NODE_RANK: expected a number from 0 to $((NNODES - 1))"
    ((NNODES == 1)) || [[ -n ${MASTER_ADDR:-} ]] ||
        fail "NNODES=$NNODES: set MASTER_ADDR to the address of node 0, the same on every node"
    ((NNODES > 1)) || MASTER_PORT=${MASTER_PORT:-0} # 0: any free port
    MASTER_PORT=${MASTER_PORT:-29500}
    [[ $MASTER_PORT =~ ^[0-9]+$ ]] || fail "MASTER_PORT=$MASTER_PORT: expected a number"
}

# Asking the driver takes no import of PyTorch; no driver, no GPU.
count_gpus() {
    local listed=0 line
    if command -v nvidia-smi >/dev/null; then
        while read -r line; do
            [[ $line != "GPU "* ]] || listed=$((listed + 1))
        done < <(nvidia-smi -L 2>/dev/null || true)
    fi
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # the driver lists all of them, this hides some
        local visible
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        [[ ${visible[0]:-} != -1 ]] || visible=()
        ((listed <= ${#visible[@]})) || listed=${#visible[@]}
    fi
    echo "$listed"
}

# What PyTorch and DeepSpeed say of themselves; asked only where the answer is needed.
probe() {
    local name value
    while IFS='=' read -r name value; do
        case $name in
        gpus) TORCH_GPUS=$value ;;
        bf16) TORCH_BF16=$value ;;
        torch) TORCH_VERSION=$value ;;
        deepspeed) DEEPSPEED_PROBLEM=$value ;;
        esac
    done < <("$PYTHON" -m tinyllm.launch_probe)
}

find_devices() {
    local gpus=0
    [[ $DEVICE == cpu ]] || gpus=$(count_gpus)
    TORCH_GPUS=0 TORCH_BF16=0 TORCH_VERSION=unknown DEEPSPEED_PROBLEM=""
    if ((gpus > 0)) || [[ $USE_DEEPSPEED == 1 ]]; then
        probe
    fi
    DEVICE_FOUND=cuda
    if ((gpus == 0)); then
        [[ $DEVICE != gpu ]] || fail "DEVICE=gpu: no GPU was found (nvidia-smi -L lists none)"
        WHY="no GPU found, so"
        [[ $DEVICE != cpu ]] || WHY="DEVICE=cpu, so"
        DEVICE_FOUND=cpu
    elif ((TORCH_GPUS == 0)); then
        WHY="$gpus GPU(s) found, but this PyTorch ($TORCH_VERSION) cannot use them, so"
        [[ $DEVICE != gpu ]] || fail "DEVICE=gpu: ${WHY%, so}; install a CUDA build"
        DEVICE_FOUND=cpu
    else
        ((gpus <= TORCH_GPUS)) || gpus=$TORCH_GPUS
        WHY="$gpus GPU(s) found, so"
    fi
    PER_NODE=$NPROC
    if [[ $DEVICE_FOUND == cpu ]]; then
        [[ $NPROC != auto ]] || PER_NODE=1
    else
        [[ $NPROC != auto ]] || PER_NODE=$gpus
        ((PER_NODE <= gpus)) || fail "NPROC=$NPROC: only $gpus GPU(s) were found"
    fi
    PROCESSES=$((PER_NODE * NNODES))
}

# deepspeed, ddp or single
choose_engine() {
    local without=""
    ENGINE=deepspeed
    if [[ $USE_DEEPSPEED == 0 ]]; then
        without="DeepSpeed turned off"
    elif [[ $USE_DEEPSPEED == 1 ]]; then
        [[ -z $DEEPSPEED_PROBLEM ]] || fail "USE_DEEPSPEED=1: DeepSpeed cannot be used: $DEEPSPEED_PROBLEM"
        [[ $PRECISION != fp16 ]] || fail "PRECISION=fp16 is trained without DeepSpeed here; leave out USE_DEEPSPEED, ZERO_STAGE and OFFLOAD"
    elif [[ $DEVICE_FOUND == cpu ]]; then
        without="without DeepSpeed"
    elif [[ -n $DEEPSPEED_PROBLEM ]]; then
        without="without DeepSpeed ($DEEPSPEED_PROBLEM)"
    elif [[ $PRECISION == fp16 ]]; then
        without="without DeepSpeed (PRECISION=fp16)"
    fi
    if [[ -n $without ]]; then
        ENGINE=ddp
        ((PROCESSES > 1)) || ENGINE=single
    fi
    local count="$PROCESSES processes" where="on the GPU" kind="$without"
    ((PROCESSES > 1)) || count="one process"
    [[ $DEVICE_FOUND == cuda ]] || where="on the CPU"
    ((NNODES == 1)) || where+=" (node $NODE_RANK of $NNODES, meeting at $MASTER_ADDR:$MASTER_PORT)"
    [[ $ENGINE != ddp ]] || kind="with DDP, $without"
    if [[ $ENGINE == deepspeed ]]; then
        kind="with DeepSpeed ZeRO-$STAGE"
        [[ $OFFLOAD == 0 ]] || kind+=" and offloading"
    fi
    WHY+=" $count $where, $kind"
}

# DTYPE: precision of the frozen base.  LoRA weights are float32 in any case.
choose_precision() {
    local words=$1 chosen=$PRECISION
    DTYPE=""
    if [[ $PRECISION == auto ]]; then
        [[ " $words" != *" --torch_dtype"* ]] || return 0 # chosen on the command line
        [[ $DEVICE_FOUND != cpu ]] || return 0 # depends on the base: the program says what it takes
        chosen=fp32
        ((TORCH_BF16 == 0)) || chosen=bf16
    fi
    [[ $chosen != fp16 || $DEVICE_FOUND == cuda ]] || fail "PRECISION=fp16 needs a GPU; a CPU takes fp32 or bf16"
    case $chosen in
    bf16) DTYPE=bfloat16 ;;
    fp16) DTYPE=float16 ;;
    fp32) DTYPE=float32 ;;
    esac
    WHY+=", base in $DTYPE"
    [[ $chosen != fp32 || $PRECISION != auto ]] || WHY+=" (this GPU has no bf16)"
}

build_command() {
    LAUNCH=("$PYTHON")
    LAUNCH_ARGS=()
    if [[ $ENGINE != single ]]; then
        # accelerate launch, with failures said in one line
        LAUNCH+=(-m tinyllm.launch --num_processes "$PROCESSES" --num_machines "$NNODES"
            --main_process_port "$MASTER_PORT" --mixed_precision no --dynamo_backend no)
        ((NNODES == 1)) || LAUNCH+=(--machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR")
        [[ $DEVICE_FOUND == cuda ]] || LAUNCH+=(--num_cpu_threads_per_process "$(threads)")
    fi
    # also for processes on a CPU: accelerate's own --cpu starts one process whatever it is told
    [[ $ENGINE != ddp ]] || LAUNCH+=(--multi_gpu)
    if [[ $ENGINE == deepspeed ]]; then
        local config="configs/zero$STAGE.json"
        [[ $OFFLOAD == 0 ]] || config="configs/zero${STAGE}_offload.json"
        LAUNCH+=(--use_deepspeed --deepspeed_config_file "$config")
        [[ $STAGE != 3 ]] || LAUNCH+=(--zero3_init_flag true) # spread the base while it is loaded
        ((NNODES == 1)) || LAUNCH+=(--deepspeed_multinode_launcher standard)
    fi
    if [[ $DEVICE_FOUND == cpu ]]; then
        LAUNCH_ARGS+=(--use_cpu True)
        export DS_ACCELERATOR=cpu # some libraries look for DeepSpeed's even when it is not used
    fi
    [[ $PRECISION == auto ]] || LAUNCH_ARGS+=(--torch_dtype "$DTYPE")
    [[ $PRECISION != fp16 ]] || LAUNCH_ARGS+=(--fp16 True) # with the loss scaled
}

# Threads of each process, so that all together keep every core busy and no more.
threads() {
    local cores
    cores=$(nproc 2>/dev/null || echo 1)
    cores=${OMP_NUM_THREADS:-$((cores / PER_NODE))}
    echo $((cores > 0 ? cores : 1))
}
