#!/usr/bin/env bash
# A Ray cluster over the nodes of a Slurm job, the service on its first node, and the learner beside it.
#   sbatch deploy/cluster/slurm.sh
# Submit it in the root of the checkout, which every node must see at the same path, with its .venv. SERVICE and TRAIN
# choose other configurations. A job that Slurm starts again goes on from its state and its checkpoints.
#SBATCH --job-name=rollouts
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --output=rollouts-%j.log
set -euo pipefail

SERVICE=${SERVICE:-deploy/examples/qwen3-8b-16-gpus/service.toml}
TRAIN=${TRAIN:-deploy/examples/qwen3-8b-16-gpus/train.toml}
ENGINE_GPUS=${ENGINE_GPUS-0,1,2,3,4,5,6}    # of the first node; other nodes give all that they have
LEARNER_GPUS=${LEARNER_GPUS-7}
PORT=${PORT:-6379}

export PATH="$PWD/.venv/bin:$PATH" RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0
# Whoever reaches Ray's ports may run code as you, and other users' jobs reach them. So they ask for a token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")

# Slurm runs this script on the first node. Everything that it starts is a child, and ends with it.
first=$SLURMD_NODENAME
others=$((SLURM_JOB_NUM_NODES - 1))
pids=()
finish() {
    trap - EXIT TERM INT
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do    # the learner first, and Ray last
        kill -TERM "${pids[i]}" 2>/dev/null && wait "${pids[i]}" || true
    done
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
trap 'exit 143' TERM INT

CUDA_VISIBLE_DEVICES=$ENGINE_GPUS ray start --head --port="$PORT" --block &
pids+=($!)
if ((others > 0)); then
    srun --nodes="$others" --ntasks="$others" --exclude="$first" \
        ray start --address="$first:$PORT" --block &
    pids+=($!)
fi
until ray health-check --address="$first:$PORT" 2>/dev/null; do
    kill -0 "${pids[@]}"    # ends the job if Ray did not start
    sleep 2
done

# The service listens on 127.0.0.1, where the learner is, so it needs neither a token nor TLS. It waits for the nodes.
CUDA_VISIBLE_DEVICES=$ENGINE_GPUS rollout-service launch --config "$SERVICE" --ray_address "$first:$PORT" \
    --ray_timeout 600 &
service=$!
pids+=("$service")
CUDA_VISIBLE_DEVICES=$LEARNER_GPUS rl-loop train --config "$TRAIN" --resume &
learner=$!
pids+=("$learner")

# The job ends when the learner does, or when the service cannot go on.
wait -n "$service" "$learner"
