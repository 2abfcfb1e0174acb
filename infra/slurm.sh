#!/usr/bin/env bash
# Starts Ray on the nodes of a Slurm job and runs one pipeline command on it:
#   sbatch infra/slurm.sh pipeline run download --source openmoji --root /shared/microdit
#   sbatch --nodes=4 --gpus-per-node=1 infra/slurm.sh \
#       pipeline run encode --root /shared/microdit --vae sdxl --text-encoder dfn5b-h14 \
#       --device cuda
# Submit it from a folder that every node sees. `--address` is added here. Rerunning is the resume:
# Slurm requeues a preempted job by itself; after a time limit submit the same command again.
#SBATCH --job-name=microdit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

fail() {
    printf 'slurm.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

[[ "${1:-} ${2:-}" == "pipeline run" ]] || fail "give the command, e.g. pipeline run encode …" 2
[[ -n "${SLURM_JOB_ID:-}" ]] || fail "not in a Slurm job; submit it with sbatch" 2
command -v ray >/dev/null || PATH="$PWD/.venv/bin:$PATH"
command -v ray >/dev/null || fail "no ray on PATH and no .venv/bin here; run make setup" 2
start_limit_s="${MICRODIT_START_LIMIT_S:-300}"

# The job's own token, in a file that only its owner reads: never in an argument or a log. A run of
# this job that was killed and requeued could not take its own away.
rm -rf "$PWD/.ray-$SLURM_JOB_ID."*
private=$(mktemp -d "$PWD/.ray-$SLURM_JOB_ID.XXXXXX")
background=()
trap cleanup EXIT
# Slurm's warning goes to the pipeline, which commits or abandons its shards within 20 s; before
# there is one, it ends the script, and by that Ray.
pipeline=""
starting="" # the pipeline is next
signalled=0
trap 'forward 143' TERM
trap 'forward 130' INT
forward() {
    # Between a start and the line that notes its number only $! knows it.
    [[ -z "$starting" || "${!-}" == "${background[-1]}" ]] || pipeline=$!
    [[ -n "$pipeline" ]] || exit "$1"
    signalled=1
    # Until it runs its own program it is a copy of this script, in which a signal may get lost.
    while cmp -s "/proc/$$/cmdline" "/proc/$pipeline/cmdline"; do :; done
    kill -TERM "$pipeline" 2>/dev/null || true
}
cleanup() {
    [[ -z "${!-}" || "${!-}" == "$pipeline" ]] || background+=("$!")
    # The workers first, then the head: a worker that loses its head waits for it.
    for ((i = ${#background[@]} - 1; i >= 0; i--)); do
        kill "${background[i]}" 2>/dev/null || true
        wait "${background[i]}" 2>/dev/null || true
    done
    rm -rf "$private"
}
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token" RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# This script runs on the first node. Its address by number: names may resolve to loopback there.
read -r address _ <<<"${MICRODIT_HEAD_IP:-$(hostname -I)}"
# Its own port: without --exclusive two jobs may meet on a node.
port="${MICRODIT_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
address="$address:$port"
cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
# Without --overlap the second step would wait for the first to end.
step=(srun --overlap --ntasks-per-node=1 "--cpus-per-task=$cpus" --kill-on-bad-exit=1)

"${step[@]}" --nodes=1 --ntasks=1 "--nodelist=${nodes[0]}" \
    ray start --head "--port=$port" "--num-cpus=$cpus" --include-dashboard=false \
    "--temp-dir=/tmp/microdit-$SLURM_JOB_ID" --block >"$private/head.log" 2>&1 &
background+=($!)

# Asks until the answer is yes, a Ray process has ended, or the time is up. Each question takes
# Ray's command a second, so the loop needs no pause.
await() { # WHAT COMMAND...
    local what="$1" pid log
    shift
    until "$@" 2>/dev/null; do
        for pid in "${background[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            for log in "$private"/*.log; do tail -n 20 "$log" >&2; done
            fail "Ray ended while $what was awaited"
        done
        ((SECONDS < start_limit_s)) || fail "$what: not in $start_limit_s s"
    done
}
healthy() { ray health-check --address "$address" >/dev/null; }
complete() { # `ray status` has one line " 1 node_…" for each node that is there
    local there
    there=$(ray status --address "$address" | grep -c '^ 1 node_') || return 1
    ((there == ${#nodes[@]}))
}

await "the head on $address" healthy
if ((${#nodes[@]} > 1)); then
    others=$(IFS=, && echo "${nodes[*]:1}")
    "${step[@]}" "--nodes=$((${#nodes[@]} - 1))" "--ntasks=$((${#nodes[@]} - 1))" \
        "--nodelist=$others" \
        ray start "--address=$address" "--num-cpus=$cpus" --block >"$private/workers.log" 2>&1 &
    background+=($!)
fi
await "${#nodes[@]} Ray nodes" complete
printf 'slurm.sh: Ray on %d nodes after %d s\n' "${#nodes[@]}" "$SECONDS"

starting=1
"$@" --address "$address" &
pipeline=$!
# `wait` returns at a signal; waiting again gives the pipeline's own exit code.
while
    signalled=0
    wait "$pipeline" && code=0 || code=$?
    ((signalled))
do :; done
exit "$code"
