#!/usr/bin/env bash
# Template: one node's part of a training run over several nodes. Start it on every node, with the
# same arguments and variables but for NODE_RANK.
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./scripts/torchrun.sh --config train.toml
#
#   NUM_NODES        number of nodes (1)
#   NODE_RANK        this node's number, from 0 (0)
#   PROCS_PER_NODE   processes on each node, one per GPU (gpu; on CPU nodes a number)
#   MASTER_ADDR      host name of node 0 (localhost)
#   MASTER_PORT      a free port there (29500)
#   PYTHON           the interpreter of the environment with ee_llm (python)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT
#                    seconds that the processes get, after a signal, to finish their step and save
#                    before torchrun kills them (3600). torch 2.11 gives 30 whatever is set here.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
# Folders in the working directory must not replace libraries of the same name.
export PYTHONSAFEPATH=1
# megatron-core needs the order of kernel launches to be that of the queue; one core for each
# process's own threads unless you know better.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NUM_NODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${PROCS_PER_NODE:-gpu}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    --module ee_llm train "$@"
