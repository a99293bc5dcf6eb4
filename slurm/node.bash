#!/usr/bin/env bash
# One task of a job's step: starts the launcher on this node, or this rank, and passes warnings on to it.
# Run by the sbatch files, by srun; what differs from node to node is looked up here.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name="node.bash on $SLURMD_NODENAME" # for the messages of common.bash
# shellcheck source=SCRIPTDIR/common.bash
source "$here/common.bash"

launcher=$1
shift
read -ra ranks <<<"$JOB_RANKS"
# One rank a GPU of this node; without GPUs, one a task that the job has on it.
ranks_here=${SLURM_GPUS_ON_NODE:-${ranks[SLURM_NODEID]}}
[[ -n ${OMP_NUM_THREADS:-} ]] || OMP_NUM_THREADS=$(threads_per_rank "$ranks_here")
export OMP_NUM_THREADS

local_address=()
if [[ -n $JOB_INTERFACE ]]; then
  export GLOO_SOCKET_IFNAME=$JOB_INTERFACE NCCL_SOCKET_IFNAME=$JOB_INTERFACE
  address=$(interface_address "$JOB_INTERFACE")
  [[ -n $address ]] || die "no IPv4 address on $JOB_INTERFACE"
  local_address=(--local_addr="$address")
fi

case $launcher in
  torchrun)
    command=(torchrun --nproc_per_node="$ranks_here")
    if ((SLURM_NNODES == 1)); then
      command+=(--standalone)
    else
      is_host=false
      ((SLURM_NODEID > 0)) || is_host=true
      command+=(--nnodes="$SLURM_NNODES" --rdzv_backend=c10d --rdzv_id="$JOB_ID" --rdzv_endpoint="$JOB_HEAD:$JOB_PORT")
      command+=(--rdzv_conf="is_host=$is_host,read_timeout=600" "${local_address[@]}")
    fi
    command+=(-m ddp_stream "$@")
    ;;
  accelerate)
    command=("$(dirname "$here")/launch/accelerate.sh" --nproc "$ranks_here")
    if ((SLURM_NNODES > 1)); then
      command+=(--config multi_node --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID")
      command+=(--head "$JOB_HEAD" --port "$JOB_PORT")
    fi
    command+=("$@")
    # USR1 is for this script alone (see below).
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT
    ;;
  srun)
    export MASTER_ADDR=$JOB_HEAD MASTER_PORT=$JOB_PORT
    command=(python -m ddp_stream "$@")
    ;;
esac
[[ -n $JOB_WRAP ]] || want_program "${command[0]}"
# shellcheck disable=SC2206
command=($JOB_WRAP "${command[@]}")

where="node $SLURMD_NODENAME"
[[ $launcher != srun ]] || where+=", rank $SLURM_PROCID"
if [[ $JOB_DRY_RUN == yes ]]; then
  echo "$where: $(print_command "${command[@]}")"
  exit
fi
exec >>"$JOB_LOGS/$SLURMD_NODENAME.log" 2>&1
echo "$(date '+%F %T') job $JOB_ID, $where: $(print_command "${command[@]}")"

# A warning becomes a file that the ranks look for. So it may come before they exist, or twice, and the launcher, which
# would answer a signal by ending them within seconds, need not know. Slurm sends it to this script, or to its whole
# process group: the launcher ignores it.
trap 'echo "$where: SIGUSR1" >>"$DDP_STREAM_STOP_FILE"' USR1
trap 'echo "$where: SIGTERM" >>"$DDP_STREAM_STOP_FILE"' TERM
(trap '' USR1; exec "${command[@]}") &
child=$!
# If Slurm's daemon above us is killed, nobody is left to end us. (`read` from a pipe that nobody writes to is a sleep
# without a process.)
(
  exec 3<> <(:)
  parent=$PPID
  while [[ $parent == "$PPID" ]]; do
    read -rt 5 -u 3 _ || true
    read -r _ _ _ parent _ <"/proc/$$/stat"
  done
  kill -KILL "$child"
) &
watcher=$!
code=0
wait_for "$child" || code=$?
kill "$watcher" 2>/dev/null || true
exit "$code"
