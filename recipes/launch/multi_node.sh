#!/usr/bin/env bash
# The same command on every node: NODES=4 HEAD_NODE=node0 recipes/launch/multi_node.sh ... (HEAD_NODE: any one of them)
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-gpu}" --rdzv_backend c10d --rdzv_id "${RUN_ID:-mtp-critic}" \
    --rdzv_endpoint "$HEAD_NODE:${PORT:-29500}" "recipes/${RECIPE:-mtp_critic}.py" --deepspeed recipes/launch/ds_zero3.json "$@"
