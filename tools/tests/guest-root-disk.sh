#!/usr/bin/env bash
# alone
# tier: guest
# limit: 1800
# A whole Debian on its root disk, mounted and busy, followed by the live tap under the unit that systemd gets; its power fails, and it comes back; it is
# lost, and comes up elsewhere.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/root-disk.sh"

make_run_dir
seconds_began=$(now)
root_disk_machine guest-root-disk
root_disk_agent

# --- replication, with its defaults ----------------------------------------------------------------------------------
sync_began=$(now)
replicates() { "$afterimage" replication start "$server" --wait </dev/null && server_state_is "$server" Replicating; }
check "it replicates" replicates
sync_seconds=$(since "$sync_began")
# proofs: how many points there are, and how many of them say how they were proven.
proofs() {
    "$afterimage" recovery-point list "$server" --json </dev/null |
        python3 -c 'import json, sys; p = json.load(sys.stdin); print(len(p), sum(1 for x in p if (x.get("proof") or {}).get("method") in ("rounds", "freeze")))'
}
has_recorded() { [ "$(last_acknowledged "$console")" -ge "$1" ]; }
machine_time() { at_machine date +%s.%N && machine_time=$said; }
all_proven() { # but for $1 of them; what proved a point comes with the agent's next report
    read -r count proven < <(proofs) && [ "$((count - proven))" -le "${1:-0}" ]
}
points_follow() { # a point cut after the time $1 of the machine
    until_true 240 has_point_after "$server" "$1" || { echo "no recovery point: $(server_field "$server" state), $(server_field "$server" reason)"; return 1; }
    until_true 120 all_proven "${2:-0}" || { echo "$proven of $count points are proven"; return 1; }
}
machine_time
check "its recovery points are proven while it is written to" points_follow "$machine_time"

# --- the agent dies, and systemd starts it again ---------------------------------------------------------------------
syncs=$(full_syncs "$server")
goes_on_after_kill() { # NUMBER of restarts until then
    restarted() { at_machine systemctl show -p NRestarts --value afterimage-agent && [ "$said" = "$1" ]; }
    until_true 180 restarted "$1" || { echo "systemd restarted it $said times, not $1"; return 1; }
    machine_time
    points_follow "$machine_time" "$1" || return 1 # a killed agent may have owed a report
    [ "$(full_syncs "$server")" = "$syncs" ] && [ "$(server_field "$server" agent.live.resyncCount)" = 0 ] || { echo "there was a full sync, or a resync"; return 1; }
    [ "$(at_machine 'journalctl -u afterimage-agent -o cat --no-pager' && grep -c 'followed while no agent ran' <<<"$said")" = "$1" ] || { echo "$said"; return 1; }
}
at_machine 'kill -KILL $(systemctl show -p MainPID --value afterimage-agent)'
check "killed, the agent is back by itself, and nothing is copied again" goes_on_after_kill 1

# --- the power fails, and comes back ---------------------------------------------------------------------------------
recorded=$(($(last_acknowledged "$console") + 100))
until_true 120 has_recorded "$recorded" || not_ok "the machine goes on recording" "$(tail -n 3 "$console" | tr '\n' ' ')"
kill_now "$guest_pid"
recorded=$(last_acknowledged "$console")
newest=$(points "$server" | tail -n 1 | cut -d' ' -f2)
boot_root_disk "switched off in the middle of it all, the machine boots again"
has_recorded_all() { [ "$(check_field "$line" last)" -ge "$recorded" ] || { echo "acknowledged: $recorded; $line"; return 1; }; }
check "it has every record that was acknowledged" has_recorded_all
check "its root file system is whole, and the same units run" as_it_was 2
# What was followed is gone with the kernel. So that the replica counts again, all of it is compared first.
compared_first() {
    local had view state phase seen= end=$((SECONDS + 400))
    while [ "$SECONDS" -lt "$end" ]; do
        had=$(point_after "$server" "$newest")
        sleep 3 # what the agent says of itself is half a second old
        view=$(server_json "$server")
        state=$(json state <<<"$view") phase=$(json agent.phase <<<"$view")
        echo "$state, $phase: $(json agent.fullSyncDoneBytes <<<"$view") of $(json agent.fullSyncTotalBytes <<<"$view") bytes"
        if [ "$state $phase" = "Initial Full Sync resync" ]; then
            seen=yes
            [ -z "$had" ] || { echo "point $had was made before everything was compared"; return 1; }
        fi
        [ "$state" != Replicating ] || ! has_point_after "$server" "$newest" || break
    done
    [ "$state" = Replicating ] && [ -n "$seen" ] && [ "$(full_syncs "$server")" = $((syncs + 1)) ] || { echo "it is $state, and there were $(full_syncs "$server") full syncs, $syncs before"; return 1; }
    at_machine 'journalctl -b -u afterimage-agent -o cat --no-pager' && grep -q 'is compared, and only what differs is sent' <<<"$said" && ! grep -q 'followed while no agent ran' <<<"$said" || { echo "$said"; return 1; }
}
compare_began=$(now)
check "its agent is back by itself, and no point is made before the disk has been compared with the replica" compared_first
view=$(server_json "$server")
compared=$(($(json agent.resyncComparedBytes <<<"$view") >> 20)) sent=$(($(json agent.sentBytes <<<"$view") >> 20)) compare_seconds=$(since "$compare_began")
differed=$((compared - ($(json agent.resyncEqualBytes <<<"$view") >> 20)))
little_sent() { [ "$compared" -gt 300 ] && [ "$differed" -lt 80 ] && [ "$sent" -lt 80 ] || { echo "$compared MiB were compared, $differed MiB differed, $sent MiB were sent"; return 1; }; }
check "by checksum: only what differs is sent" little_sent
machine_time
check "recovery points follow, and are proven" points_follow "$machine_time" 2

# --- disaster and failover -------------------------------------------------------------------------------------------
# Points are cut by the machine's clock, and acknowledgements received by ours: at most so much is the machine's ahead.
machine_time
more=$(($(last_acknowledged "$console") + 100))
until_true 240 has_recorded "$more" && points_follow "$machine_time" 2 || not_ok "the machine goes on recording" "$(tail -n 3 "$console" | tr '\n' ' ')"
asked=$(now)
machine_time
ahead=$(awk -v m="$machine_time" -v a="$asked" 'BEGIN { printf "%.6f", m - a }')
kill_now "$guest_pid"
killed=$(now)
failed_over() {
    "$afterimage" failover start "$server" --yes "$server" --network isolated --boot-check 'serial:AFTERIMAGE-CHECK ok .* kernel=' --boot-timeout 400 --wait </dev/null &&
        server_state_is "$server" "Failed Over" || { server_field "$server" reason; return 1; }
}
check "lost, it is failed over: its own check passes there" failed_over
view=$(server_json "$server")
recovered=$(json instances.-1 <<<"$view")
line=$(json bootLine <<<"$recovered")
point=$(json recoveryPoint <<<"$recovered")
say "$line"
cut=$(points "$server" | awk -v id="$point" -v ahead="$ahead" '$1 == id { printf "%.6f", $2 - ahead }')
promised=$(last_acknowledged "$console" "${cut:-0}") last=$(check_field "$line" last) acknowledged=$(last_acknowledged "$console")
has_all() { [ "$promised" -gt 0 ] && [ "${last:-0}" -ge "$promised" ] || { echo "acknowledged before the cut: $promised; it has ${last:-none}"; return 1; }; }
check "every record that was acknowledged before the cut is there" has_all
check "its root file system is writable and whole, and the same units run" as_it_was 3
recovered_console=$(json consolePath <<<"$recovered")
goes_on() { grep -aq 'AFTERIMAGE-ACK' "$recovered_console"; }
check "it goes on recording" until_true 180 goes_on

# The point itself, as after a power cut.
whole_in_point() {
    local image=$run_dir/point.img copy=$run_dir/copy device line status=0
    "$afterimage" recovery-point export "$server" "$point" --to raw --output "$image" --wait </dev/null || return 1
    mkdir "$copy"
    device=$(losetup --find --show --offset "$debian_disk_offset" "$image")
    mount "$device" "$copy" || status=1 # replays the journal
    if [ "$status" = 0 ]; then
        line=$("$copy/usr/local/bin/recorder" check "$copy/var/lib/witness") && [[ " $line " == *" last=$last "* ]] || { echo "$line, not last=$last"; status=1; }
        umount "$copy"
        e2fsck -fn "$device" || status=1
    fi
    losetup -d "$device"
    return "$status"
}
check "the point's root file system needs nothing but its journal, and has the same records" whole_in_point
check "the failover is committed" "$afterimage" failover commit "$server" --yes "$server"

[ "$failures" = 0 ] || finish
cat <<SUMMARY
    $(os_release PRETTY_NAME), Linux $(check_field "$first" kernel): the primary was up after $(check_field "$first" uptime) s, the recovered machine after $(check_field "$line" uptime) s
    first full sync $sync_seconds s; after the power cut $compared MiB were compared within $compare_seconds s, of which $differed MiB differed ($sent MiB sent)
    $proven of $count recovery points say how they were proven
    acknowledged $acknowledged records, $promised before the cut; recovered $last
    RPO $(since "$cut" "$killed") s, RTO $(json rtoSeconds <<<"$recovered") s; the whole test $(since "$seconds_began") s
SUMMARY
finish
