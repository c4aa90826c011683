#!/usr/bin/env bash
# Train, or tune, on several nodes. Start this template on every node with the same arguments and variables,
# except for NODE_RANK.
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./scripts/torchrun.sh --config train.toml
#
# Environment variables, with their defaults:
#   NUM_NODES        Number of nodes (1).
#   COMMAND          train or tune (train).
#   NODE_RANK        Number of this node, from 0 (0).
#   PROCS_PER_NODE   Processes on each node: gpu for one per GPU, or a number on CPU nodes (gpu).
#   MASTER_ADDR      Host name of node 0 (localhost).
#   MASTER_PORT      A free port on node 0 (29500).
#   PYTHON           Interpreter of the environment with ee_llm (python).
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT
#                    Time in seconds, after a signal, in which the processes finish their step and
#                    save before torchrun kills them (3600). torch 2.11 always uses 30.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
# Do not import libraries from the working directory.
export PYTHONSAFEPATH=1
# megatron-core requires kernels to run in the order of their launches. One thread per process is
# the right number unless you have measured another.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NUM_NODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${PROCS_PER_NODE:-gpu}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    --module ee_llm "${COMMAND:-train}" "$@"
