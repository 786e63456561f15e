#!/usr/bin/env bash
# alone
# tier: guest
# limit: 420
# A quickstart that is interrupted, or killed outright, leaves nothing; the latter is cleaned up by the next run.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"

[ "$(id -u)" = 0 ] || { skip quickstart-signals "it needs root"; finish; }
make_run_dir
# Not below $run_dir: the names of its sockets would become too long.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/s.XXXX")
export TMPDIR
defer rm -rf "$TMPDIR"
left() {
    find "$TMPDIR" -mindepth 1 -maxdepth 1
    loops_below "$TMPDIR"
    processes_naming "$TMPDIR"
}
# interrupted SIGNAL PATTERN: sends SIGNAL once PATTERN is in what it said
interrupted() {
    local signal=$1 pattern=$2 name=$3 pid
    start "$run_dir/log" env --default-signal=INT "$repository/tools/quickstart" # a shell's background jobs ignore SIGINT
    pid=$started_pid
    until_true 180 grep -qE -- "$pattern" "$run_dir/log" || { not_ok "$name" "it never said /$pattern/: $(tail -n 3 "$run_dir/log")"; stop_process "$pid"; return; }
    sleep 1
    kill -"$signal" "$pid"
    until_true 60 process_gone "$pid" || not_ok "$name" "it does not end"
    rm -f "$run_dir/log"
}
nothing_left() { [ -z "$(left)" ]; }

interrupted TERM '^4\. ' "SIGTERM while the primary boots"
check "SIGTERM while the primary boots: nothing is left" nothing_left
interrupted INT '^7\. ' "SIGINT during the drill"
check "SIGINT during the drill: nothing is left" nothing_left
interrupted KILL 'QEMU started' "SIGKILL during the drill"
[ -n "$(left)" ] && ok "SIGKILL during the drill: something is left, of course" || not_ok "SIGKILL during the drill" "nothing was left: was it running?"
bash -c 'source "$1"; make_run_dir' reclaim "$repository/tools/lib/common.sh"
check "SIGKILL during the drill: the next run removes it" nothing_left
finish
