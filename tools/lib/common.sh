# Sourced by every tool: words, the run's own directory, and a cleanup stack that runs on every exit.
#
# A run owns one directory, $run_dir. Whatever it makes (loop devices on files in there, processes, sockets) is
# either inside that directory or on the cleanup stack, so that a finished run leaves nothing and two runs never meet.

set -Eeuo pipefail
# shellcheck disable=SC2034 # read by the tools
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tool_name=$(basename "$0")
cache_dir=${AFTERIMAGE_CACHE:-/var/cache/afterimage}

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$tool_name" "$*" >&2; exit 1; }
now() { printf '%s' "${EPOCHREALTIME/,/.}"; }                      # seconds since 1970, with fraction
since() { awk -v a="$1" -v b="${2:-$(now)}" 'BEGIN { printf "%.2f", b - a }'; }

# --- the cleanup stack -----------------------------------------------------------------------------------------------
cleanup_stack=()
run_dir=
cleanup_owner=$BASHPID
stopped_at=
trap 'stopped_at=${BASH_SOURCE[0]##*/}:$LINENO' ERR                # a command that failed where nobody looks: no silent end

# defer COMMAND ARG...: runs at exit, last one first. Arguments are kept as they are.
defer() { cleanup_stack+=("$(printf '%q ' "$@")"); }

# run_cleanup also calls on_failure, when a tool has defined it and ends with an error of its own.
run_cleanup() {
    local status=$?
    [ "$BASHPID" = "$cleanup_owner" ] || exit "$status"
    trap '' INT TERM HUP
    set +e
    trap - ERR
    [ -z "$stopped_at" ] || say "$tool_name: stopped at $stopped_at, where a command failed with status $status"
    [ "$status" = 0 ] || [ "$status" -ge 128 ] || ! declare -F on_failure >/dev/null || on_failure
    local index
    for ((index = ${#cleanup_stack[@]} - 1; index >= 0; index--)); do eval "${cleanup_stack[index]}" </dev/null >/dev/null 2>&1; done
    cleanup_stack=()
    exit "$status"
}
trap run_cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# make_run_dir: sets $run_dir. Its name is short, because unix socket paths end at 107 bytes.
make_run_dir() {
    [ -z "$run_dir" ] || return 0
    reclaim_stale_runs
    run_dir=$(mktemp -d "${TMPDIR:-/tmp}/afterimage-$(cut -c1-10 <<<"${tool_name%.sh}").XXXXXX")
    echo "$$ $(process_start_time $$)" >"$run_dir/owner"
    defer remove_run "$run_dir"
}

# need_space MIB: ends here, with clear words, instead of somewhere inside with "No space left on device".
need_space() {
    local free
    free=$(($(df --output=avail -k "${TMPDIR:-/tmp}" | tail -n 1) / 1024))
    [ "$free" -ge "$1" ] || die "there are $free MiB free in ${TMPDIR:-/tmp}, this needs $1 MiB: make room, or set TMPDIR"
}

process_start_time() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20 || true; }

# remove_run DIR: ends processes that work in DIR, detaches loop devices on its files, removes it.
remove_run() {
    local dir=$1 pid device round
    [[ $dir == */afterimage-*.?????? ]] || return 1
    for round in TERM KILL; do
        for pid in $(processes_naming "$dir"); do kill -"$round" "$pid" 2>/dev/null || true; done
        for _ in $(seq 20); do [ -n "$(processes_naming "$dir")" ] || break; sleep 0.1; done
    done
    unmount_below "$dir"
    for device in $(loops_below "$dir"); do losetup -d "$device" || true; done
    rm -rf "$dir"
}

# unmount_below DIR: a file system that is frozen is thawed first. Without a mount point nobody could any more, and who waits for it could not even be killed.
unmount_below() {
    local point
    mount_points_below "$1" | while read -r point; do
        ! findmnt -n -t ext4,xfs "$point" || fsfreeze --unfreeze "$point" || true
        umount "$point" || umount -l "$point" || true
    done >/dev/null 2>&1
}

# Processes whose command line names a path below DIR: only those that this run started know that name.
processes_naming() {
    local dir=$1 file pid
    for file in /proc/[0-9]*/cmdline; do
        pid=${file#/proc/}; pid=${pid%/cmdline}
        [ "$pid" != "$$" ] && [ "$pid" != "$BASHPID" ] || continue
        if grep -qzF -- "$dir/" "$file" 2>/dev/null; then echo "$pid"; fi
    done 2>/dev/null || true
}
loops_below() { losetup -n -l -O NAME,BACK-FILE 2>/dev/null | awk -v d="$1/" 'index($2, d) == 1 { print $1 }'; }
mount_points_below() { awk -v d="$1/" 'index($2, d) == 1 { print $2 }' /proc/mounts | sort -r; }

# A tool that was killed with SIGKILL cannot clean up; the next run does it.
reclaim_stale_runs() {
    local owner pid start
    for owner in "${TMPDIR:-/tmp}"/afterimage-*.??????/owner; do
        [ -f "$owner" ] && [ -O "$owner" ] || continue
        read -r pid start <"$owner" || continue
        [ "$(process_start_time "$pid")" = "$start" ] || remove_run "$(dirname "$owner")"
    done
}

# keep_bpffs: a bpffs that this run mounts on /sys/fs/bpf (the live tap does, where the system has not) goes with it, unless somebody has
# something pinned there by then. The kernel's own files end in .debug.
keep_bpffs() {
    grep -q ' /sys/fs/bpf bpf ' /proc/mounts || defer unmount_unused_bpffs
}
unmount_unused_bpffs() {
    [ -n "$(find /sys/fs/bpf -mindepth 1 ! -name '*.debug' 2>/dev/null)" ] || umount /sys/fs/bpf
}

# --- processes -------------------------------------------------------------------------------------------------------
# start LOG COMMAND...: starts COMMAND in the background; its pid is in $started_pid. It dies with this shell.
start() {
    local log=$1
    shift
    setpriv --pdeathsig KILL "$@" >>"$log" 2>&1 </dev/null &
    started_pid=$!
    disown "$started_pid"                                          # no "Killed" lines from the shell
    defer stop_process "$started_pid" "$(process_start_time "$started_pid")"
}

# A killed process may be a zombie while a thread of it is still in the kernel and holds its locks and disks.
alive() { kill -0 "$1" 2>/dev/null && [ "$(sed 's/^.*) //' "/proc/$1/task/"*/stat 2>/dev/null | grep -c '^[^ZX]')" != 0 ]; }

# stop_process PID [START_TIME]: TERM, then KILL after 5 s. Does nothing when PID is meanwhile somebody else.
stop_process() {
    local pid=$1
    [ -z "${2:-}" ] || [ "$(process_start_time "$pid")" = "$2" ] || return 0
    kill -TERM "$pid" 2>/dev/null || return 0
    for _ in $(seq 50); do alive "$pid" || return 0; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
    for _ in $(seq 50); do alive "$pid" || return 0; sleep 0.1; done
}

# kill_now PID...: SIGKILL, and wait until it is gone.
kill_now() {
    local pid
    kill -KILL "$@" 2>/dev/null || true
    for pid in "$@"; do until_true 30 process_gone "$pid" || return 1; done
}
process_gone() { ! alive "$1"; }

# until_true SECONDS COMMAND...: asks ten times a second.
until_true() {
    local end=$((SECONDS + $1 + 1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

# foreground COMMAND...: like COMMAND, but a signal to this shell is answered at once.
foreground() {
    local pid status=0
    "$@" </dev/null &
    pid=$!
    defer stop_process "$pid" "$(process_start_time "$pid")"
    wait "$pid" || status=$?
    unset 'cleanup_stack[-1]'
    return "$status"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# attach_loop FILE: a loop device with direct I/O on a file in $run_dir; its name is in $loop_device. It goes with the run, found
# by its file: by the time of the cleanup its number may be somebody else's.
attach_loop() { loop_device=$(losetup --find --show --direct-io=on "$1"); }
