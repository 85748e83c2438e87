#!/usr/bin/env bash
# All GPUs of this machine (or GPUS=n of them), with RECIPE=ppo or another one in place of mtp_critic.
# Arguments go to the recipe; the last --deepspeed wins.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${GPUS:-gpu}" \
    "recipes/${RECIPE:-mtp_critic}.py" --deepspeed recipes/launch/ds_zero3.json "$@"
