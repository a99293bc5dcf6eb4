# The batch side of a job, run once, on its first node: what all sbatch files do. Sourced, never run.
# shellcheck shell=bash disable=SC2154  # here, name and about are set by the file that sources this one

# shellcheck source=SCRIPTDIR/../launch/common.bash disable=SC1091
source "$here/../launch/common.bash"

usage() {
  cat <<END
Usage: sbatch [OPTION...] slurm/$name [--dry-run] [--] [COMMAND] [ARGUMENT...]

Run 'python -m ddp_stream COMMAND ARGUMENT...' on the nodes of a Slurm job:
$about.
COMMAND is train unless given. What follows COMMAND, or --, belongs to ddp_stream.

  --dry-run    have every node print the command that it would run, and do not run it
  --help       print this text

The allocation decides: one rank a GPU (sbatch --nodes=2 --gpus-per-node=4), or where the job has none one rank a task
(sbatch --nodes=2 --ntasks-per-node=2). Without --run.dir the run directory is runs/slurm-JOB; in an array, every task
gets one of its own: its number is added to the name.

Warned by SIGUSR1 (the time limit, a preemption, or 'scancel --batch --signal=USR1 JOB'), train saves a checkpoint
after the same step on all ranks, and the job requeues itself and goes on. A job that is done or failed is not requeued,
and scancel ends it. --nodes=1-2 lets it go on with fewer nodes when one has died.

Settings of the site: slurm/site.bash. Further settings, in the environment of sbatch:
  DDP_STREAM_SWEEP=FILE    in an array, further arguments for task N: line N of FILE

Example: sbatch --nodes=2 --gpus-per-node=4 slurm/$name --run.dir runs/x --epochs 5
END
}

# say WORD...: a line of the batch log.
say() {
  echo "$(date '+%F %T') $*"
}

die() {
  say "$name: $*" >&2
  exit 2
}

# expand COUNTS: Slurm's "2(x3),1" as "2 2 2 1".
expand() {
  local part count
  local -a parts all=()
  IFS=, read -ra parts <<<"$1"
  for part in "${parts[@]}"; do
    count=1
    [[ $part =~ \(x([0-9]+)\)$ ]] && count=${BASH_REMATCH[1]}
    for ((; count > 0; count--)); do all+=("${part%%(*}"); done
  done
  echo "${all[*]}"
}

smallest() {
  local each least=$1
  for each in "$@"; do ((each < least)) && least=$each; done
  echo "$least"
}

# job_field NAME: from Slurm's record of this job.
job_field() {
  local record
  record=$(scontrol show job -o "$job") || return
  [[ $record =~ (^| )$1=([^ ]*) ]] && echo "${BASH_REMATCH[2]}"
}

# address_of NODE: the head's address, as the other nodes reach it.
address_of() {
  local found=""
  if [[ -n $DDP_STREAM_INTERFACE ]]; then
    found=$(interface_address "$DDP_STREAM_INTERFACE") || true
    [[ -n $found ]] || die "node $1 has no IPv4 address on DDP_STREAM_INTERFACE=$DDP_STREAM_INTERFACE (see 'ip addr')"
  else
    found=$(scontrol show node -o "$1") || die "scontrol does not know node $1 of this job"
    found=${found#* NodeAddr=}
    found=${found%% *}
  fi
  echo "$found"
}

# interface_address NAME: this node's IPv4 address on an interface; empty if it has none.
interface_address() {
  ip -4 -oneline address show dev "$1" | awk '{ split($4, parts, "/"); print parts[1]; exit }'
}

# free_port ADDRESS: jobs differ in their number and attempts in theirs, so two on one node do not meet. Below the range
# from which the kernel serves everybody else.
free_port() {
  local try port ephemeral first=10000
  read -r ephemeral _ </proc/sys/net/ipv4/ip_local_port_range
  ((ephemeral >= first + 1000)) || ephemeral=32768
  for ((try = 0; try < 20; try++)); do
    port=$((first + (SLURM_JOB_ID + 1009 * restart + 499 * try) % (ephemeral - first)))
    # Nobody answers: it is free.
    if ! (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "no free port on $1 between $first and $ephemeral in 20 tries, the last one $port"
}

# status FIELD: from the run's status.json; empty if there is none.
status() {
  local text=""
  local string="\"$1\": \"(([^\"\\]|\\\\.)*)\"" number="\"$1\": ([0-9]+)"
  if [[ -f $run_dir/status.json ]]; then text=$(<"$run_dir/status.json"); fi
  if [[ $text =~ $string || $text =~ $number ]]; then echo "${BASH_REMATCH[1]}"; fi
}

# lost_nodes: sets `lost` to the nodes of this job that do not answer. Slurm itself may take minutes to notice.
lost_nodes() {
  local node
  lost=()
  answers "${nodes[0]}" || return 0 # this script runs there, so it is the question that does not work
  for node in "${nodes[@]:1}"; do
    answers "$node" || lost+=("$node")
  done
}

answers() {
  timeout 60 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --gres=none --nodelist="$1" \
    true >/dev/null 2>&1
}

# leave_out_lost: this job, which is requeued, goes on with the nodes that are left.
leave_out_lost() {
  local index out="${lost[*]}" before left=0 left_tasks=0
  local -a tasks
  read -ra tasks <<<"$JOB_RANKS"
  for index in "${!nodes[@]}"; do
    if [[ " $out " != *" ${nodes[index]} "* ]]; then
      left=$((left + 1)) left_tasks=$((left_tasks + tasks[index]))
    fi
  done
  before=$(job_field ExcNodeList) || before="(null)"
  out=${out// /,}
  [[ $before == "(null)" ]] || out+=,$before
  if scontrol update JobId="$job" NumNodes="$left" NumTasks="$left_tasks" ExcNodeList="$out"; then
    say "to go on with $left node(s), without $out"
  else
    say "scontrol cannot leave out $out: the job may wait until it is back"
  fi
}

requeue() {
  local state
  if ((restart >= DDP_STREAM_MAX_REQUEUES)); then
    say "not requeued: this job was requeued $restart times, DDP_STREAM_MAX_REQUEUES=$DDP_STREAM_MAX_REQUEUES;" \
      "submit it again with --run.dir $run_dir to go on"
    exit 1
  fi
  state=$(job_field JobState) || die "not requeued: scontrol does not answer; submit again with --run.dir $run_dir"
  if [[ $state != RUNNING && -z $ended ]]; then
    say "not requeued: Slurm is ending this job itself ($state)"
    exit 1
  fi
  say "requeued, for the $((restart + 1)). time of at most $DDP_STREAM_MAX_REQUEUES"
  trap '' TERM # which the requeue sends to this script
  scontrol requeue "$job" || die "scontrol cannot requeue this job; submit again with --run.dir $run_dir to go on"
  ((${#lost[@]} == 0)) || leave_out_lost
  exit 0
}

on_warning() {
  warned=yes
  say "warned by SIGUSR1; the job would end at $(job_field EndTime || echo '?')"
  ask_to_stop
}

# A file rather than a signal: it may be there before the ranks are (which then take one step, so that there is progress
# even if warnings always come first), it may be written twice, and it reaches into containers.
ask_to_stop() {
  [[ -z $stop_file ]] || echo "warned by SIGUSR1" >>"$stop_file"
}

# was_warned: by SIGUSR1, here or on any node. SIGTERM, which ends the tasks that outlive another, writes there too.
was_warned() {
  [[ -e $stop_file ]] && grep -q SIGUSR1 "$stop_file"
}

on_end() {
  ended=$(job_field Reason) || ended=unknown
  [[ $ended != None ]] || ended="scancel, a preemption, or the loss of a node"
  say "SIGTERM: Slurm ends this job ($ended)"
  # If it lost a node, it requeues the job itself, and the little time that is left is enough to say how.
  mapfile -t lost < <(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down --format=%N)
  ((${#lost[@]} == 0)) || leave_out_lost
}

# choose_run_dir ARGUMENT...: the one asked for, without which one named after the job.
choose_run_dir() {
  run_dir=""
  while [[ $# -gt 0 ]]; do
    case $1 in
      --run.dir) run_dir=${2:-} ;;
      --run.dir=*) run_dir=${1#*=} ;;
    esac
    shift
  done
  if [[ -z $run_dir ]]; then
    run_dir=runs/slurm-$job
  elif [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run_dir+=-$SLURM_ARRAY_TASK_ID
  fi
}

# sweep_arguments: sets `sweep`, the line of the sweep's file that belongs to this task of the array.
sweep_arguments() {
  [[ -n ${DDP_STREAM_SWEEP:-} ]] || return 0
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "DDP_STREAM_SWEEP=$DDP_STREAM_SWEEP is for arrays; submit with --array=1-N"
  sweep=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$DDP_STREAM_SWEEP") || die "cannot read DDP_STREAM_SWEEP=$DDP_STREAM_SWEEP"
  [[ -n $sweep ]] || die "DDP_STREAM_SWEEP=$DDP_STREAM_SWEEP has no line $SLURM_ARRAY_TASK_ID, the number of this task"
}

commit() {
  local commit
  commit=$(git -C "$here" rev-parse --short HEAD 2>/dev/null) || { echo "not in git"; return; }
  [[ -z $(git -C "$here" status --porcelain --untracked-files=no 2>/dev/null) ]] || commit+=", with changes"
  echo "commit $commit"
}

# main LAUNCHER ARGUMENT...: the life of one attempt, from the allocation to the requeue.
main() {
  local launcher=$1 dry_run=no
  shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      --help) usage; exit ;;
      --dry-run) dry_run=yes; shift ;;
      --) shift; break ;;
      *) break ;;
    esac
  done
  case ${1:--} in
    -*) set -- train "$@" ;;
  esac
  [[ -n ${SLURM_JOB_ID:-} ]] || die "this is no Slurm job; submit it: sbatch slurm/$name (or see --help)"
  restart=${SLURM_RESTART_COUNT:-0} warned=${warned:-} ended="" stop_file="" lost=()
  # In an array, SLURM_JOB_ID of one task is that of the whole array: to requeue it would requeue all tasks.
  job=$SLURM_JOB_ID
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  trap on_warning USR1
  trap on_end TERM
  want_program scontrol
  want_program srun
  # shellcheck source=SCRIPTDIR/site.bash
  source "$here/site.bash"
  if [[ -n $DDP_STREAM_MODULES ]]; then
    set +u # module functions are not written for it
    # shellcheck disable=SC2086
    module load $DDP_STREAM_MODULES
    set -u
  fi

  local listed
  listed=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol cannot list the nodes of $SLURM_JOB_NODELIST"
  mapfile -t nodes <<<"$listed"
  say "job $job, attempt $restart, on ${#nodes[@]} node(s): ${nodes[*]}; until $(job_field EndTime)"
  say "code: $(cd "$here/.." && pwd), $(commit)"

  local command=$1 sweep=""
  shift
  sweep_arguments
  if [[ -n $sweep ]]; then
    local -a more
    read -ra more <<<"$sweep"
    set -- "$@" "${more[@]}"
  fi
  choose_run_dir "$@"
  [[ $command != train ]] || set -- "$@" --run.dir "$run_dir" # the last one counts
  export JOB_LOGS=$run_dir/logs
  [[ $dry_run == yes ]] || mkdir -p "$JOB_LOGS" || die "the run directory $run_dir cannot be made"
  say "run directory: $run_dir; logs: $JOB_LOGS/NODE.log"

  lay_out "$launcher"
  JOB_HEAD=$(address_of "${nodes[0]}")
  JOB_PORT=$(free_port "$JOB_HEAD")
  export JOB_HEAD JOB_PORT JOB_ID=$job-$restart JOB_DRY_RUN=$dry_run JOB_INTERFACE=$DDP_STREAM_INTERFACE
  export JOB_WRAP=$DDP_STREAM_WRAP
  say "head: ${nodes[0]}, $JOB_HEAD port $JOB_PORT"
  # shellcheck disable=SC2206
  srun+=($DDP_STREAM_SRUN_OPTIONS bash "$here/node.bash" "$launcher" "$command" "$@")
  say "command: $(print_command "${srun[@]}")"

  rm -f "$run_dir"/.stop-*
  stop_file=$run_dir/.stop-$JOB_ID
  export DDP_STREAM_STOP_FILE=$stop_file
  [[ -z $warned ]] || ask_to_stop
  # What ends this attempt must not be taken from the one before.
  [[ $command != train || $dry_run == yes ]] || rm -f "$run_dir/status.json"
  local started=$SECONDS code=0
  "${srun[@]}" &
  wait_for $! || code=$?
  say "srun ended with $code after $((SECONDS - started)) s"
  [[ $command == train && $dry_run == no ]] || exit "$code"
  conclude "$code"
}

# wait_for PID: its exit code. `wait` itself returns when a signal comes, so: until it is gone.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1"
}

# lay_out LAUNCHER: sets `srun`, the command that starts the tasks, and how many ranks a node has.
lay_out() {
  local -a tasks cpus
  local each total=0 ranks
  read -ra tasks <<<"$(expand "$SLURM_TASKS_PER_NODE")"
  read -ra cpus <<<"$(expand "$SLURM_JOB_CPUS_PER_NODE")"
  # With GPUs, every node counts its own.
  export JOB_RANKS="${tasks[*]}"
  if [[ $1 == srun ]]; then
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
      for each in "${!tasks[@]}"; do tasks[each]=$SLURM_GPUS_ON_NODE; done
    fi
  else
    for each in "${!tasks[@]}"; do tasks[each]=1; done
    # One task has all GPUs of the node.
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND
  fi
  for each in "${tasks[@]}"; do total=$((total + each)); done
  ranks=${tasks[0]}
  # srun does not take --cpus-per-task from the job. Later releases refuse two variables that differ.
  SRUN_CPUS_PER_TASK=$(($(smallest "${cpus[@]}") / ranks))
  ((SRUN_CPUS_PER_TASK > 0)) ||
    die "$ranks ranks a node, but only $(smallest "${cpus[@]}") CPU(s): submit with --ntasks-per-node=$ranks"
  export SRUN_CPUS_PER_TASK
  unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
  srun=(srun --nodes="${#nodes[@]}" --ntasks="$total" --distribution=block --kill-on-bad-exit=1 --wait=60)
  local even=yes
  for each in "${tasks[@]}"; do [[ $each == "$ranks" ]] || even=no; done
  [[ $even == no ]] || srun+=(--ntasks-per-node="$ranks")
}

# conclude CODE: why it ended, and what follows.
conclude() {
  local how reason
  how=$(status status) reason=$(status reason)
  case $how in
    done) say "done: $reason"; exit 0 ;;
    "") say "the ranks left no status.json: killed, or never begun" ;;
    *) say "$how at step $(status step): $reason" ;;
  esac
  if [[ -n $ended && $ended != TimeLimit ]]; then
    say "not requeued by this script: Slurm ended the job, and requeues it if it was preempted or lost a node"
    exit 1
  fi
  if [[ $how != preempted && -z $ended ]]; then
    lost_nodes
    if ((${#lost[@]} > 0)); then
      say "nodes that do not answer: ${lost[*]}"
      requeue
    fi
  fi
  case $how in
    preempted)
      if was_warned || [[ $reason == *"Slurm allocation ends"* ]]; then requeue; fi
      say "not requeued: it was asked to stop, not preempted; submit again with --run.dir $run_dir to go on"
      exit 0
      ;;
    "")
      if was_warned; then requeue; fi
      ;;
  esac
  say "not requeued: it failed; the last lines of every log:"
  tail -n 15 "$JOB_LOGS"/*.log
  exit 1
}
