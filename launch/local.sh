#!/usr/bin/env bash
# One machine, one rank per GPU (gloo on the CPU where there is none), under torchrun; or to debug.
set -euo pipefail
# shellcheck source=SCRIPTDIR/common.bash disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: launch/local.sh [--nproc N] [--debug [R]] [--dry-run] [--] [COMMAND] [ARGUMENT...]

Run `python -m ddp_stream COMMAND ARGUMENT...` as N ranks on this machine, under torchrun.
COMMAND is train unless given. What follows COMMAND, or --, belongs to ddp_stream.

  --nproc N    ranks to start (default: one per GPU, or 2 where there is none)
  --debug [R]  rank R (default: 0) under pdb: it stops before it begins, at every breakpoint(), and where it fails,
               while the others pass by their breakpoints and wait, for a day if need be. On the CPU, over gloo,
               with TORCH_DISTRIBUTED_DEBUG=INFO unless it is set already
  --dry-run    print the command and do not run it
  --help       print this text

OMP_NUM_THREADS is set to cores / N unless it is set already. With or without --debug, `kill -USR2 PID` makes a rank
print the stacks of its threads and go on: where does it hang?

Examples:
  launch/local.sh --nproc 2 train --epochs 1
  launch/local.sh --debug 1 --nproc 2 train --data.num_workers 0
END
}

nproc=""
debug=""
dry_run=no
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage; exit ;;
    --dry-run) dry_run=yes; shift ;;
    --nproc) want_value "$@"; want_positive "$1" "$2"; nproc=$2; shift 2 ;;
    --debug)
      debug=0
      if [[ ${2:-} =~ ^[0-9]+$ ]]; then
        debug=$2
        shift
      fi
      shift
      ;;
    --) shift; break ;;
    -*) unknown_option "$1" ;;
    *) break ;;
  esac
done
case ${1:--} in
  -*) set -- train "$@" ;;
esac

want_program torchrun
if [[ -z $nproc ]]; then
  nproc=$(count_accelerators)
  [[ $nproc -gt 0 ]] || nproc=2
fi

threads=$(threads_per_rank "$nproc")
environment=("OMP_NUM_THREADS=$threads" "${signals[@]}")
if [[ -n $debug ]]; then
  [[ $debug -lt $nproc ]] || die "--debug must be a rank in 0..$((nproc - 1)) with --nproc $nproc, not '$debug'"
  # Not DETAIL: with gloo and torch 2.15 that ends in a segmentation fault where DDP wraps the model.
  level=${TORCH_DISTRIBUTED_DEBUG:-INFO}
  environment+=("DDP_STREAM_DEBUG_RANK=$debug" "TORCH_DISTRIBUTED_DEBUG=$level" CUDA_VISIBLE_DEVICES=)
  case $1 in
    train | audit) set -- "$1" --timeout_s 86400 "${@:2}" ;;
  esac
fi
command=(env "${environment[@]}" torchrun --standalone "--nproc_per_node=$nproc" -m ddp_stream "$@")
if [[ $dry_run == yes ]]; then
  print_command "${command[@]}"
  exit
fi
# exec, so that a signal sent to this script reaches torchrun.
exec "${command[@]}"
