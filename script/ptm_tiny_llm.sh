#!/usr/bin/env bash
# Pretrain the embedded base: fetch text, build corpus and tokenizer, train, export.
#
#   ./script/ptm_tiny_llm.sh                    whole run; the same command resumes it
#   ./script/ptm_tiny_llm.sh --max_minutes 60   any setting (see --help) may follow
#   ./script/ptm_tiny_llm.sh --tiny             complete rebuild in about a minute, own text only

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup_python requirement.txt

CONFIG="${CONFIG:-configs/ptm_tiny_llm_16m.yaml}"
TINY_ARGS="
    --sources none --work outputs/pretrain_tiny --export_to outputs/pretrain_tiny/model
    --stage full --max_steps 12 --warmup_steps 2 --vocab_size 2048
    --hidden_size 64 --intermediate_size 128 --num_layers 2 --num_heads 2
    --num_key_value_heads 1 --head_dim 32 --max_length 128 --evaluate_passages 8
"

args=(--config "$CONFIG")
for arg in "$@"; do
    if [[ "$arg" == "--tiny" ]]; then
        # shellcheck disable=SC2206  # one word per setting
        args+=($TINY_ARGS)
    else
        args+=("$arg")
    fi
done

exec "$PYTHON" -m tinyllm.pretrain "${args[@]}"
