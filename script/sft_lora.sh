#!/usr/bin/env bash
# LoRA fine-tuning in one command:  ./script/sft_lora.sh
#
# Every variable below can be set from outside (LR=1e-4 ./script/sft_lora.sh), and arguments are
# passed on to sft_lora.py (./script/sft_lora.sh --max_steps 20).

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# What to train
MODEL_SIZE=${MODEL_SIZE:-16m}            # only names the folders
TRAIN_EPOCHS=${TRAIN_EPOCHS:-3}          # passes over the data
EMBEDDED_BASE=outputs/ckpt/ptm_tiny_llm_16m_epoch1/last_ptm_model
BASE_MODEL=${BASE_MODEL:-$EMBEDDED_BASE} # a folder, a .gguf file, smollm2-135m or gemma3-270m
ACCEPT_LICENSE=${ACCEPT_LICENSE:-False}  # True: you accept the licence of a base fetched by name
DATASET=${DATASET:-data/sft_train}       # files or folders of training rows
case $BASE_MODEL in                      # folders keep the usual name, whatever they hold
    smollm2-135m | gemma3-270m | *.gguf) RUN_NAME=sft_lora_$(basename "$BASE_MODEL" .gguf) ;;
    *) RUN_NAME=sft_lora_tiny_llm_$MODEL_SIZE ;;
esac
OUTPUT_DIR=${OUTPUT_DIR:-outputs/ckpt/${RUN_NAME}_epoch${TRAIN_EPOCHS}}

# LoRA
LORA_R=${LORA_R:-16}                     # rank: the size of the adapter
LORA_ALPHA=${LORA_ALPHA:-32}             # scale of the adapter, usually 2 x r
LORA_DROPOUT=${LORA_DROPOUT:-0.1}        # dropout on the adapter's input
LORA_TARGETS=${LORA_TARGETS:-q_proj,v_proj,k_proj,o_proj,gate_proj,up_proj,down_proj}

# Training
MBS=${MBS:-4}                            # rows per device and micro-batch
GAS=${GAS:-4}                            # micro-batches per optimizer step
LR=${LR:-5e-4}                           # peak learning rate

# Launch (docs/launch.md); on several nodes also NNODES NODE_RANK MASTER_ADDR MASTER_PORT
DEVICE=${DEVICE:-auto}                   # auto: the GPUs if there are any; cpu or gpu insists
NPROC=${NPROC:-auto}                     # processes a node: auto is one per GPU, one on a CPU
USE_DEEPSPEED=${USE_DEEPSPEED:-auto}     # auto: with a GPU yes, without no; 1 or 0 insists
ZERO_STAGE=${ZERO_STAGE:-auto}           # DeepSpeed ZeRO: 0 nothing sharded, 1 optimizer,
                                         # 2 gradients too (auto), 3 the weights too
OFFLOAD=${OFFLOAD:-0}                    # 1: optimizer (and with ZeRO-3 weights) wait in CPU memory
PRECISION=${PRECISION:-auto}             # of the frozen base: auto, bf16, fp16 or fp32

LORA_ARGS=(
    --use_lora True
    --lora_r "$LORA_R"
    --lora_alpha "$LORA_ALPHA"
    --lora_dropout "$LORA_DROPOUT"
    --lora_target_modules "$LORA_TARGETS"
)
TRAIN_ARGS=(
    --base_model_path "$BASE_MODEL"
    --accept_license "$ACCEPT_LICENSE"
    --dataset "$DATASET"
    --output_dir "$OUTPUT_DIR"
    --per_device_train_batch_size "$MBS"
    --gradient_accumulation_steps "$GAS"
    --learning_rate "$LR"
    --num_train_epochs "$TRAIN_EPOCHS"
)

REQUIREMENTS=(requirement.txt)
case $BASE_MODEL in smollm2-135m | gemma3-270m | *.gguf) REQUIREMENTS+=(requirement-gguf.txt) ;; esac
setup_python "${REQUIREMENTS[@]}"
if [[ $BASE_MODEL == "$EMBEDDED_BASE" ]]; then
    "$PYTHON" -m tinyllm.embedded "$EMBEDDED_BASE"
fi
source script/launch.sh
choose_launch "$@"
COMMAND=("${LAUNCH[@]}" sft_lora.py "${LORA_ARGS[@]}" "${TRAIN_ARGS[@]}" "${LAUNCH_ARGS[@]}" "$@")
printf 'launch:%s\n' "$(printf ' %q' "${COMMAND[@]}")" >&2
exec "${COMMAND[@]}"
