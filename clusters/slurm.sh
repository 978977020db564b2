#!/usr/bin/env bash
# Train on Slurm nodes: sbatch clusters/slurm.sh experiment=movielens trainer.workers=2 runs_folder=/shared/runs
# Submit it in a checkout on a shared file system after `make setup`; its arguments go to jobs/train.py.
#SBATCH --job-name=raysys
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --exclusive
#SBATCH --time=04:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

# --exclusive: at its end Ray stops every Ray process of the user on the node.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${nodes[0]}:6379"

export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-eth0}" # the interface that the nodes reach each other by (ib0, hsn0, ...)
export RAY_TMPDIR="${RAY_TMPDIR:-/tmp}"                 # Slurm's TMPDIR is often too long for Ray's sockets
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300       # seconds for all nodes to join: starting from a shared disk is slow
export RAY_AUTH_MODE=token                              # the token in ~/.ray, which all nodes share
ray get-auth-token --generate >/dev/null

# The same command on every node: the first starts the head and runs the job, the others join until it ends.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    -- env RAY_ADDRESS="$address" python jobs/train.py trainer=ray "$@"
