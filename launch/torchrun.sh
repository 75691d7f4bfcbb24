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
# Where it can, torchrun passes on the signals by which schedulers warn, and waits for a checkpoint before it kills.
stop=()
options=$(torchrun --help)
if [[ $options == *--signals-to-handle* ]]; then
  stop+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2)
else
  echo "this torchrun does not pass on SIGUSR1 and SIGUSR2: use srun, or SIGTERM" >&2
fi
if [[ $options == *--shutdown-timeout* ]]; then
  stop+=(--shutdown-timeout "${SPARSEKD_SHUTDOWN_SECONDS:-600}")
else
  echo "this torchrun kills its ranks 30 s after a signal: use srun where a checkpoint takes longer" >&2
fi
if [ "${NNODES:-1}" = 1 ]; then
  exec torchrun "${stop[@]}" --standalone --nproc-per-node "$processes" --no-python sparsekd "$@"
fi
exec torchrun "${stop[@]}" --nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --nproc-per-node "$processes" \
  --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}" --no-python sparsekd "$@"
