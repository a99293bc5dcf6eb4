# What local.sh and accelerate.sh share. Sourced, never run.
# Kept to bash 3.2 (macOS): no associative arrays, and no "${array[@]}" of an array that may be empty.

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
