#!/usr/bin/env bash
# One or several machines under `accelerate launch`, with one of the configurations in launch/accelerate/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=SCRIPTDIR/common.bash disable=SC1091
source "$here/common.bash"

usage() {
  cat <<'END'
Usage: launch/accelerate.sh [--config NAME] [--nproc N] [--dry-run] [--] [COMMAND] [ARGUMENT...]
       launch/accelerate.sh --config multi_node --nnodes M --node-rank R --head HOST --port PORT [...]

Run `python -m ddp_stream COMMAND ARGUMENT...` under accelerate; train gets `--engine accelerate`.
COMMAND is train unless given. What follows COMMAND, or --, belongs to ddp_stream.

  --config NAME    cpu_gloo, one_gpu, multi_gpu or multi_node
                   (default: cpu_gloo without a GPU, one_gpu with one, multi_gpu with several)
  --nproc N        ranks to start on this machine (default: one per GPU, or 2 where there is none)
  --dry-run        print the command and do not run it
  --help           print this text

multi_node: run it once on every machine; what must match is in `launch/multi_node.sh --help`.
  --nnodes M       machines
  --node-rank R    this machine, 0..M-1; machine 0 is the head and holds rank 0
  --head HOST      address of machine 0, as the others reach it: not a loopback address
  --port PORT      a free port on machine 0

OMP_NUM_THREADS is set to cores / N unless it is set already.

Example: launch/accelerate.sh --config cpu_gloo --nproc 2 train --epochs 1
END
}

config=""
nproc=""
dry_run=no
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage; exit ;;
    --dry-run) dry_run=yes; shift ;;
    --config) want_value "$@"; config=$2; shift 2 ;;
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

want_program accelerate
if [[ -z $config || -z $nproc ]]; then
  accelerators=$(count_accelerators)
fi
if [[ -z $config ]]; then
  case $accelerators in
    0) config=cpu_gloo ;;
    1) config=one_gpu ;;
    *) config=multi_gpu ;;
  esac
fi
if [[ -z $nproc ]]; then
  case $config in
    cpu_gloo) nproc=2 ;;
    one_gpu) nproc=1 ;;
    *) nproc=$((accelerators > 0 ? accelerators : 2)) ;;
  esac
fi

case $config in
  cpu_gloo | multi_gpu) ;;
  one_gpu) [[ $nproc -eq 1 ]] || die "--nproc $nproc with --config one_gpu, which is one process; use multi_gpu" ;;
  multi_node) want_machines "--config multi_node" ;;
  *) die "--config must be cpu_gloo, one_gpu, multi_gpu or multi_node, not '$config'" ;;
esac
if [[ $config != multi_node && -n $nnodes$node_rank$head$port ]]; then
  die "--nnodes, --node-rank, --head and --port are for --config multi_node, not $config"
fi

# accelerate divides --num_processes among the machines, so it is the world size.
world_size=$((nproc * ${nnodes:-1}))
threads=$(threads_per_rank "$nproc")
# `accelerate launch` can start fewer processes than it was asked for and say nothing. ddp_stream checks this promise.
environment=("DDP_STREAM_WORLD_SIZE=$world_size" "OMP_NUM_THREADS=$threads" "${signals[@]}")
if [[ $config == cpu_gloo ]]; then
  # The YAML's use_cpu does not reach the processes that torchrun starts: where there are GPUs, they would use them.
  environment+=(ACCELERATE_USE_CPU=true)
fi

command=(env "${environment[@]}" accelerate launch --config_file "$here/accelerate/$config.yaml")
command+=(--num_processes "$world_size")
if [[ $config == multi_node ]]; then
  command+=(--num_machines "$nnodes" --machine_rank "$node_rank" --main_process_ip "$head" --main_process_port "$port")
fi
command+=(-m ddp_stream "$1")
if [[ $1 == train ]]; then
  command+=(--engine accelerate)
fi
shift
command+=("$@")
if [[ $dry_run == yes ]]; then
  print_command "${command[@]}"
  exit
fi
# exec, so that a signal sent to this script reaches accelerate.
exec "${command[@]}"
