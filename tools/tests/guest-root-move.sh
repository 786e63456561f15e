#!/usr/bin/env bash
# alone
# tier: guest
# limit: 1500
# The planned move of a whole Debian that writes to its root disk all the time: its file systems stand still, the machine that comes up elsewhere has every record
# that was ever acknowledged, and the host that was left writes nothing more until it is switched off: its disk and what was moved are then the same, byte by byte.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/root-disk.sh"

make_run_dir
root_disk_machine guest-root-move --copy-free-space # so that both can be compared whole
root_disk_agent
replicates() { "$afterimage" replication start "$server" --wait </dev/null && server_state_is "$server" Replicating; }
check "it replicates" replicates
records_more() { local before; before=$(last_acknowledged "$console"); until_true 120 recorded_after "$before"; }
recorded_after() { [ "$(last_acknowledged "$console")" -gt "$1" ]; }
check "the machine records" records_more

# --- taken back --------------------------------------------------------------------------------------------------------
task_failed_with() { "$afterimage" task list --server "$server" --limit 1 --json </dev/null | json 0.error | grep -qE -- "$1"; }
moved() {
    "$afterimage" failover start "$server" --graceful --yes "$server" --network isolated --boot-check 'serial:AFTERIMAGE-CHECK ok .* kernel=' --boot-timeout 400 --wait </dev/null &&
        server_state_is "$server" "Failed Over" || { server_field "$server" reason; return 1; }
}
"$afterimage" replication stop "$server" </dev/null >/dev/null
check "the last point would take a while" "$afterimage" replication start "$server" --throttle 1MiB --wait
at_machine 'head -c 24000000 /dev/urandom >/var/tmp/ballast'
"$afterimage" failover start "$server" --graceful --yes "$server" --network isolated </dev/null >/dev/null
stands() { local before; before=$(last_acknowledged "$console"); sleep 5; [ "$(last_acknowledged "$console")" = "$before" ]; }
until_true 60 stands || not_ok "the machine stands in the middle of its move" "it records on"
at_machine 'kill -KILL $(systemctl show -p MainPID --value afterimage-agent)'
check "its agent is killed in the middle: the machine records on" records_more
check "the move is taken back" until_true 120 task_failed_with "let go|not connected|did not happen"
check "and it replicates again" until_true 240 server_state_is "$server" Replicating

# --- done --------------------------------------------------------------------------------------------------------------
"$afterimage" replication stop "$server" </dev/null >/dev/null
check "without a throttle" "$afterimage" replication start "$server" --throttle 0 --wait
check "the machine records" records_more
check "the planned move: its own check passes there" moved
view=$(server_json "$server")
line=$(json instances.-1.bootLine <<<"$view")
point=$(json instances.-1.recoveryPoint <<<"$view")
say "$line"
check "the host that was left records no more" stands
check "and its agent still answers" [ "$(json agentConnected <<<"$view")" = True ]
acknowledged=$(last_acknowledged "$console") last=$(check_field "$line" last)
has_all() { [ "$acknowledged" -gt 0 ] && [ "${last:-0}" -ge "$acknowledged" ] || { echo "acknowledged: $acknowledged; it has ${last:-none}"; return 1; }; }
check "every record that was ever acknowledged is there" has_all
check "its root file system is writable and whole, and the same units run" as_it_was 2
printf 'echo o >/proc/sysrq-trigger\n' >&"$typed"
check "the host is switched off, as the manual says" until_true 60 process_gone "$guest_pid"
same_as_disk() {
    "$afterimage" recovery-point export "$server" "$point" --to raw --output "$run_dir/point.img" --wait </dev/null || return 1
    for image in disk point; do sha256sum <"$run_dir/$image.img" | tee "$run_dir/$image.sum"; done
    cmp "$run_dir/disk.sum" "$run_dir/point.sum" || { echo "$(cmp -l "$disk" "$run_dir/point.img" | wc -l) bytes differ; the first: $(cmp "$disk" "$run_dir/point.img")"; return 1; }
}
check "the point that was moved and the host's root disk are the same, all of it" same_as_disk
check "the failover is committed" "$afterimage" failover commit "$server" --yes "$server"
[ "$failures" = 0 ] || finish
say "acknowledged $acknowledged records, $last recovered; SHA-256 of the root disk, and of its replica: $(cut -d' ' -f1 "$run_dir/point.sum")"
finish
