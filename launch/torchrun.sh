#!/usr/bin/env bash
# Starts one sparsekd verb on every device of this node, or of several nodes.
#   launch/torchrun.sh PROCESSES_PER_NODE VERB [overrides]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each, as for any torchrun job.
set -euo pipefail
processes=${1:?usage: launch/torchrun.sh PROCESSES_PER_NODE VERB [overrides]}
shift
# A script's folder must not come first on the path: a folder `kernels` would shadow Hugging Face's library.
export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "${NNODES:-1}" = 1 ]; then
  exec torchrun --standalone --nproc-per-node "$processes" --no-python sparsekd "$@"
fi
exec torchrun --nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --nproc-per-node "$processes" \
  --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}" --no-python sparsekd "$@"
