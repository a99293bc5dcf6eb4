#!/usr/bin/env bash
# One machine, one rank per GPU (gloo on the CPU where there is none), under torchrun.
set -euo pipefail
# shellcheck source=SCRIPTDIR/common.bash disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

usage() {
  cat <<'END'
Usage: launch/local.sh [--nproc N] [--dry-run] [--] [COMMAND] [ARGUMENT...]

Run `python -m ddp_stream COMMAND ARGUMENT...` as N ranks on this machine, under torchrun.
COMMAND is train unless given. What follows COMMAND, or --, belongs to ddp_stream.

  --nproc N    ranks to start (default: one per GPU, or 2 where there is none)
  --dry-run    print the command and do not run it
  --help       print this text

OMP_NUM_THREADS is set to cores / N unless it is set already.

Example: launch/local.sh --nproc 2 train --epochs 1
END
}

nproc=""
dry_run=no
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage; exit ;;
    --dry-run) dry_run=yes; shift ;;
    --nproc) want_value "$@"; want_positive "$1" "$2"; nproc=$2; shift 2 ;;
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

torchrun=(torchrun --standalone "--nproc_per_node=$nproc")
threads=$(threads_per_rank "$nproc")
# By default SIGUSR1 kills torchrun at once and leaves its ranks running. These two pass it on and give the ranks time
# to save. As variables rather than flags, because older releases do not know the flags and would refuse them.
environment=("OMP_NUM_THREADS=$threads" "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" PET_SHUTDOWN_TIMEOUT=60)
command=(env "${environment[@]}" "${torchrun[@]}" -m ddp_stream "$@")
if [[ $dry_run == yes ]]; then
  print_command "${command[@]}"
  exit
fi
# exec, so that a signal sent to this script reaches torchrun.
exec "${command[@]}"
