# shellcheck shell=bash
# Sourced by the templates: what a job does around engine/run.py. Nothing here is of one site.
#
# Variables, all optional: RECIPE (quickstart), DATA, MODEL, OUTPUT, ARGS (more options of
# engine/run.py), MAX_RESTARTS (20), SELFDISTILL_ROOT (the clone; by default, where sbatch was
# called). USED_NODES: of the job's nodes so many work, the others are spare (sbatch --no-kill);
# with fewer than MIN_NODES (USED_NODES) left the job goes back to the queue.

ROOT=$(cd "${SELFDISTILL_ROOT:-$SLURM_SUBMIT_DIR}" && pwd) || exit 2
[ ! -x "$ROOT/.venv/bin/python" ] || PATH=$ROOT/.venv/bin:$PATH
if ! command -v python >/dev/null; then
    echo "error: there is no python on ${SLURMD_NODENAME:-this node}: load its module or activate its" \
        "environment in the template" >&2
    exit 2
fi
OUTPUT=${OUTPUT:-runs/slurm/run}
# Node-local, since a compiled op belongs to one kind of machine.
OWN=/tmp/selfdistill-$(id -un)
export OWN TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$OWN/torch_extensions}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OWN/inductor}
# srun does not take this over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A signal to all of the job is for the ranks: this shell stays, to see how they ended.
trap : TERM USR2

# The embedded examples are packed once, where no data are named.
RECIPE=${RECIPE-quickstart}
if [ -z "${DATA:-}${DATASETS:-}" ]; then
    case $RECIPE in quickstart) kind=images ;; quickstart_text) kind=text ;; *) kind= ;; esac
    if [ -n "$kind" ]; then
        DATA=$(dirname "$OUTPUT")/example-$kind
        PYTHONPATH=$ROOT python -m launcher.examples "$kind" "$DATA" || exit
    fi
fi

# one_seed: makes this array task's run folder, which shares the stages that are there already.
one_seed() {
    local run
    run=$(realpath -m "$OUTPUT")
    case ${SEED:=0} in
    *[!0-9]*) # an arithmetic expression could run commands
        echo "error: SEED=$SEED is no whole number: correct it" >&2
        exit 2
        ;;
    esac
    SEED=$((10#$SEED + SLURM_ARRAY_TASK_ID))
    OUTPUT=$run/seeds/$SEED
    mkdir -p "$OUTPUT" || exit 2
    local stage
    for stage in "$run"/pretrain "$run"/distill-*; do
        [ ! -d "$stage" ] || ln -sfn "$stage" "$OUTPUT/"
    done
    [ -e "$OUTPUT/config.toml" ] || [ ! -e "$run/config.toml" ] || cp "$run/config.toml" "$OUTPUT/"
}

# stale LOCK: whether the build that made it is gone, so that the next would wait without end (with
# torch before 2.12; later ones lock through the kernel).
stale() {
    # A builder on this node has its lock open.
    [ -z "$(find /proc/[0-9]*/fd -lname "$1" 2>/dev/null)" ] || return 1
    case $1 in
    /tmp/selfdistill-*) ;; # no other node sees this folder
    *) [ -n "$(find "$1" -mmin +10 2>/dev/null)" ] ;;
    esac
}

# own: makes this node's folder of compiled ops, for this user alone: whoever can write there has
# the ranks run his code.
own() {
    case $TORCH_EXTENSIONS_DIR:$TORCHINDUCTOR_CACHE_DIR in *"$OWN"/*) ;; *) return 0 ;; esac
    mkdir -p -m 700 "$OWN" 2>/dev/null
    if [ -L "$OWN" ] || [ ! -O "$OWN" ] || ! chmod 700 "$OWN"; then
        echo "error: $OWN on $SLURMD_NODENAME is another user's, and compiled code is loaded from" \
            "it: have it removed, or set TORCH_EXTENSIONS_DIR and TORCHINDUCTOR_CACHE_DIR" >&2
        return 2
    fi
}

# rank COMMAND...: one task of srun. The first that fails leaves its exit code in $FIRST; what the
# others end with says nothing of the cause, since srun ends them. SLURM's signals may come to this
# shell alone (ProctrackType=cgroup) or to all of the task's processes: the command gets them from
# here. Ctrl-C as USR2: a second one would end it at once.
rank() {
    local lock code=0 pid=
    trap '[ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' TERM
    trap '[ -z "$pid" ] || kill -USR2 "$pid" 2>/dev/null' USR2 INT
    for lock in "$TORCH_EXTENSIONS_DIR"/*/lock; do
        if [ -e "$lock" ] && stale "$lock"; then rm -f "$lock"; fi
    done
    own || code=$?
    if [ $code = 0 ]; then
        "$@" &
        pid=$!
        while :; do
            wait "$pid"
            code=$?
            # Above 128 with the command still there: a signal to this shell.
            [ $code -gt 128 ] && kill -0 "$pid" 2>/dev/null || break
        done
    fi
    if [ $code != 0 ]; then
        (set -o noclobber && echo "$code $SLURM_PROCID $SLURMD_NODENAME" >"$FIRST") 2>/dev/null
    fi
    return $code
}
export -f own rank stale

# ranks WORDS...: one launch of engine/run.py on $where; returns how its first rank to fail ended.
ranks() {
    local code first who node
    # shellcheck disable=SC2016  # $@ is for the task's shell
    srun --export=ALL --kill-on-bad-exit=1 "${where[@]}" bash -c 'rank "$@"' rank \
        python "$ROOT/engine/run.py" "$@"
    code=$?
    if [ $code != 0 ]; then
        # A shared file system may show another node's file some seconds late.
        for _ in 1 2 3 4 5; do [ -e "$FIRST" ] || sleep 1; done
        if read -r first who node 2>/dev/null <"$FIRST"; then
            code=$first
            echo "rank $who on $node was the first to fail, with exit code $code" >&2
        fi
        rm -f "$FIRST"
    fi
    return $code
}

# counted NAME DEFAULT: a variable that is a number of nodes, from 1 to DEFAULT.
counted() {
    local value=${!1:-$2}
    case $value in
    *[!0-9]* | 0 | ??????*) ;;
    *) [ "$value" -gt "$2" ] || { echo "$((10#$value))" && return; } ;;
    esac
    echo "error: $1=$value: give a number of nodes from 1 to $2" >&2
    return 2
}

# tasks: of a node.
tasks() {
    echo "${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-1} / SLURM_JOB_NUM_NODES))}"
}

# answering NODES...: those on which a command runs, in their order.
answering() {
    local node
    for node; do
        timeout -k 5 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
            bash -c 'echo "$SLURMD_NODENAME"' 2>/dev/null &
    done | sort >"$FIRST.nodes"
    for node; do grep -qx "$node" "$FIRST.nodes" && echo "$node"; done
    rm -f "$FIRST.nodes"
}

# launch OPTIONS...: runs the ranks, and ends the job as they ended.
launch() {
    local words code nodes used count least started lost where again=
    # Quotes hold, as in a shell, but nothing is expanded or run.
    mapfile -d '' -t words < <(ARGS=${ARGS:-} python -c '
import os, shlex
print(*(f"{word}\0" for word in shlex.split(os.environ["ARGS"])), sep="", end="")' 2>/dev/null)
    if ! wait $!; then
        echo "error: ARGS=${ARGS:-}: its quotes are not balanced: correct them" >&2
        exit 2
    fi
    [ -z "$RECIPE" ] || words+=(--recipe "$RECIPE")
    [ -z "${MODEL:-}" ] || words+=(--model "$MODEL")
    [ -z "${DATA:-}" ] || words+=(--data "$DATA")
    export FIRST=$OUTPUT/.first-exit-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    if ! { mkdir -p "$OUTPUT" && echo >"$FIRST" && rm "$FIRST"; }; then
        echo "error: OUTPUT=$OUTPUT cannot be written: choose another folder" >&2
        exit 2
    fi
    case ${MAX_RESTARTS:-20} in
    *[!0-9]* | ??????*)
        echo "error: MAX_RESTARTS=$MAX_RESTARTS: give a number" >&2
        exit 2
        ;;
    esac
    if [ -n "${USED_NODES:-}" ]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        count=$(counted USED_NODES "${#nodes[@]}") && least=$(counted MIN_NODES "$count") || exit 2
        started=$count
    fi
    while :; do
        used=("${nodes[@]:0:count}")
        where=()
        if [ -n "${USED_NODES:-}" ]; then
            where=("--nodes=$count" "--ntasks=$((count * $(tasks)))" $again
                "--nodelist=$(IFS=, && echo "${used[*]}")")
        fi
        ranks "$@" --output "$OUTPUT" "${words[@]}"
        code=$?
        if [ $code = 0 ] || [ -z "${USED_NODES:-}" ]; then break; fi
        mapfile -t nodes < <(answering "${nodes[@]}")
        lost=$(comm -23 <(printf '%s\n' "${used[@]}" | sort) <(printf '%s\n' "${nodes[@]}" | sort))
        if [ -n "$lost" ]; then
            [ "${#nodes[@]}" -ge "$count" ] || count=${#nodes[@]}
            # shellcheck disable=SC2086  # one line
            echo $lost "does not answer: ${#nodes[@]} nodes are left" >&2
        elif [ $code = 2 ] && [ "$count" -lt "$started" ]; then
            count=$((count - 1)) # a batch that so many ranks cannot share, perhaps
        else
            break
        fi
        if [ "$count" -lt "$least" ]; then
            code=75
            break
        fi
        echo "going on with $count of them" >&2
        export SELFDISTILL_AGAIN=1 # what this job began is its own, whatever --overwrite says
        again=--overlap # with what is left of the step before, which a lost node never ends
    done
    # 75: interrupted, or another rank is gone. Above 128: killed by a signal. Again will do.
    if [ "$code" = 75 ] || [ "$code" -gt 128 ]; then requeue "$code"; fi
    exit "$code"
}

# progress: changes whenever a checkpoint or a result is added below $OUTPUT.
progress() {
    find "$OUTPUT"/ -follow \( -name latest -o -name result.json \) -printf '%p %T@\n' 2>/dev/null |
        sort | cksum
}

# requeue CODE: puts the job back into the queue, unless SLURM itself or the cap ends it.
requeue() {
    local most=${MAX_RESTARTS:-20} note=$OUTPUT/.restarts-$SLURM_JOB_ID id=$SLURM_JOB_ID
    local count=0 before='' now
    # To scontrol, the number of an array's last task means all of its tasks.
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # Restarts that got on do not count: a long job reaches its time limit often.
    now=$(progress)
    if [ -e "$note" ]; then { read -r count && read -r before; } <"$note"; fi
    [ "$now" = "$before" ] || count=0
    # Preempted, requeued or cancelled from outside: a cancelled job would come back to life.
    if ! scontrol --oneliner show job "$id" | grep -q ' JobState=RUNNING '; then
        echo "exit code $1: SLURM ends the job itself" >&2
        COMES_BACK=perhaps
    elif [ "$count" -ge "$most" ]; then
        echo "error: exit code $1 after $count restarts without progress, MAX_RESTARTS=$most: no more" >&2
        rm -f "$note"
    else
        echo "exit code $1: back to the queue, restart $((count + 1)) of at most $most without progress" >&2
        printf '%s\n%s\n' $((count + 1)) "$now" >"$note"
        COMES_BACK=yes
        scontrol requeue "$id"
    fi
    exit "$1"
}
