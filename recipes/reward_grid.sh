#!/usr/bin/env bash
# The grid of personalized reward models on one data set: aggregators, user models, alpha, and K.
#
#   bash recipes/reward_grid.sh personas8.parquet runs/grid            # all arms, one after the other
#   bash recipes/reward_grid.sh personas8.parquet runs/grid soft_k10   # one arm
#
# An arm that is finished is left alone, an interrupted one goes on from its newest complete checkpoint. Meant for a
# GPU: on two CPU cores one arm takes hours. The test part is read once, at the end of each arm.
set -euo pipefail

data=$1 out=$2 only=${3:-}
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
joint="--tuning lora --learning-rate 5e-4 --lr-scheduler-type cosine --warmup-steps 0.05 --num-train-epochs 2
    --per-device-train-batch-size 16 --train-sampling-strategy group_by_length"
soft="$joint --aggregator soft_prompt"

[ -e "$out/data/split.json" ] || prlhf data split "$data" --by prompt --out "$out/data"

arm() { # name, flags
    local name=$1
    shift
    [ -z "$only" ] || [ "$only" = "$name" ] || return 0
    if [ ! -e "$out/$name/prlhf.json" ]; then
        prlhf prm train --model "$model" --data "$out/data/train.parquet" --eval-data "$out/data/validation.parquet" \
            --user-text ignore --max-length 768 --output-dir "$out/$name" "$@"
    fi
    prlhf eval preference "$out/$name" --data "$out/data/test.parquet" --out "$out/$name.json"
}

# shellcheck disable=SC2086  # the flags are words
{
    arm frozen_heads
    arm frozen_heads_cluster --user-model cluster --user-clusters 4
    arm linear $joint
    arm linear_alpha1 $joint --user-loss-alpha 1
    arm linear_cluster $joint --user-model cluster --user-clusters 4
    arm linear_uniform $joint --user-model uniform
    arm soft_k10 $soft --user-tokens 10
    arm soft_k10_alpha1 $soft --user-tokens 10 --user-loss-alpha 1
    arm soft_k1 $soft --user-tokens 1
    arm soft_k10_cluster $soft --user-tokens 10 --user-model cluster --user-clusters 4
    arm soft_k10_uniform $soft --user-tokens 10 --user-model uniform
}
