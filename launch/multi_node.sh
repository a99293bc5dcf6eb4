#!/usr/bin/env bash
# Several machines under torchrun, started by hand: this script once on each. Under Slurm use slurm/ instead.
set -euo pipefail
# shellcheck source=SCRIPTDIR/common.bash disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: launch/multi_node.sh --nnodes M --node-rank R --head HOST --port PORT [--nproc N] [--dry-run] [--]
                            [COMMAND] [ARGUMENT...]

Run `python -m ddp_stream COMMAND ARGUMENT...` as N ranks on each of M machines, under torchrun. Run it once on every
machine; the launches wait for each other. COMMAND is train unless given. What follows COMMAND, or --, belongs to
ddp_stream.

  --nnodes M       machines
  --node-rank R    this machine, 0..M-1; machine 0 is the head and holds rank 0
  --head HOST      address of machine 0, as the others reach it: not a loopback address
  --port PORT      a free port on machine 0
  --nproc N        ranks to start on this machine (default: one per GPU, or 2 where there is none)
  --dry-run        print the command and do not run it
  --help           print this text

The same on all machines: every option but --node-rank, COMMAND and its arguments, the code, the versions of Python,
torch and accelerate, and what the data's path leads to. The run directory is on a file system that all share.

OMP_NUM_THREADS is set to cores / N unless it is set already. gloo talks over the network interface by which a rank
reaches the head, unless GLOO_SOCKET_IFNAME names another; NCCL makes its own choice, unless NCCL_SOCKET_IFNAME does.

Example, on machine 0:
  launch/multi_node.sh --nnodes 2 --node-rank 0 --head 10.0.0.1 --port 29400 --nproc 2 train --epochs 1
and on machine 1:
  launch/multi_node.sh --nnodes 2 --node-rank 1 --head 10.0.0.1 --port 29400 --nproc 2 train --epochs 1
END
}

nproc=""
dry_run=no
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage; exit ;;
    --dry-run) dry_run=yes; shift ;;
    --nproc) want_value "$@"; want_positive "$1" "$2"; nproc=$2; shift 2 ;;
    --nnodes) want_value "$@"; want_positive "$1" "$2"; nnodes=$2; shift 2 ;;
    --node-rank) want_value "$@"; node_rank=$2; shift 2 ;;
    --head) want_value "$@"; head=$2; shift 2 ;;
    --port) want_value "$@"; want_positive "$1" "$2"; port=$2; shift 2 ;;
    --) shift; break ;;
    -*) unknown_option "$1" ;;
    *) break ;;
  esac
done
case ${1:--} in
  -*) set -- train "$@" ;;
esac

want_program torchrun
want_machines ""
if [[ -z $nproc ]]; then
  nproc=$(count_accelerators)
  [[ $nproc -gt 0 ]] || nproc=2
fi

threads=$(threads_per_rank "$nproc")
# ddp_stream checks the promise: machines with another --nproc would make another world.
environment=("DDP_STREAM_WORLD_SIZE=$((nproc * nnodes))" "OMP_NUM_THREADS=$threads" "${signals[@]}")
# Static: ranks follow --node-rank. c10d numbers machines as they arrive, and guesses the head by its host name.
torchrun=(torchrun --rdzv_backend=static "--nnodes=$nnodes" "--node_rank=$node_rank" "--nproc_per_node=$nproc")
torchrun+=("--master_addr=$head" "--master_port=$port")
command=(env "${environment[@]}" "${torchrun[@]}" -m ddp_stream "$@")
if [[ $dry_run == yes ]]; then
  print_command "${command[@]}"
  exit
fi
# exec, so that a signal sent to this script reaches torchrun.
exec "${command[@]}"
