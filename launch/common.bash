# What the scripts beside this file share. Sourced, never run.
# Kept to bash 3.2 (macOS): no associative arrays, and no "${array[@]}" of an array that may be empty.

# By default SIGUSR1 kills torchrun at once and leaves its ranks running. These two pass it on and give the ranks time
# to save. As variables rather than flags: accelerate has no such flags, and an older torchrun would refuse them.
# shellcheck disable=SC2034 # for whoever sources this
signals=("PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}" PET_SHUTDOWN_TIMEOUT=60)

# Options of the scripts that start ranks on several machines.
nnodes=""
node_rank=""
head=""
port=""

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# want_value OPTION [VALUE...]: the option has something after it.
want_value() {
  [[ $# -ge 2 ]] || die "$1 needs a value; see --help"
}

# want_positive OPTION VALUE
want_positive() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 must be a positive integer, not '$2'"
}

# want_program NAME
want_program() {
  command -v "$1" >/dev/null || die "$1 is not on PATH; activate the environment that ddp_stream is installed in"
}

# want_machines WHO: the four options above, which WHO needs, are there and make sense.
want_machines() {
  local option
  for option in nnodes node_rank head port; do
    [[ -n ${!option} ]] || die "${1:+$1 }needs --${option/_/-}; see --help"
  done
  [[ $node_rank =~ ^(0|[1-9][0-9]*)$ && $node_rank -lt $nnodes ]] ||
    die "--node-rank must be in 0..$((nnodes - 1)) with --nnodes $nnodes, not '$node_rank'"
  [[ $port -le 65535 ]] || die "--port must be in 1..65535, not '$port'"
}

unknown_option() {
  die "unknown option $1; this script's own are written like '--nproc 2' (see --help), ddp_stream's go after its" \
    "command, like 'train $1'"
}

# The devices that torch itself would use, so that we never promise a rank a device that this build cannot drive.
count_accelerators() {
  want_program python
  python -c 'import torch; print(torch.accelerator.device_count())'
}

# threads_per_rank NPROC: left alone, torchrun gives every rank one thread, and a bare python all cores to each.
threads_per_rank() {
  local cores
  if [[ -n ${OMP_NUM_THREADS:-} ]]; then
    echo "$OMP_NUM_THREADS"
    return
  fi
  # nproc knows the cores this job may use (Slurm, taskset, a container); macOS does not have it.
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  echo $((cores > $1 ? cores / $1 : 1))
}

# print_command WORD...: on one line, ready to paste into a shell.
print_command() {
  local word line=""
  for word in "$@"; do
    # %q alone would also escape harmless commas.
    [[ $word =~ ^[A-Za-z0-9_=:,./-]+$ ]] || printf -v word '%q' "$word"
    line+=" $word"
  done
  echo "${line# }"
}
