#!/usr/bin/env bash
# limit: 300
# Recovery points by people's hands: made on demand (with everything that was written before the request), held, released, deleted; and
# the policy, which thins out the rest and survives a restart.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product recovery-points
make_run_dir
protect 32
refuses "on demand needs Replicating" "only in Replicating" "$afterimage" recovery-point create s
"$afterimage" replication start s --policy all:1h --wait </dev/null >/dev/null

field() { "$afterimage" recovery-point list s --json </dev/null | python3 -c '
import json, sys
for p in json.load(sys.stdin):
    if p["id"] == sys.argv[1]: print(p.get(sys.argv[2]))' "$1" "$2"; }
is() { [ "$(field "$1" "$2")" = "$3" ] || { echo "$2 of $1 is $(field "$1" "$2")"; return 1; }; }
there() { [ -n "$(field "$1" id)" ]; }
gone() { ! there "$1"; }

# --- on demand -------------------------------------------------------------------------------------------------------
# Each time the disk is as it was before the request, and nobody writes meanwhile: the point must have all of it.
for round in 1 2 3; do
    head -c 3M /dev/urandom >"$run_dir/new"
    qemu-io -f raw -c "write -s $run_dir/new $((round * 4))M 3M" "nbd+unix:///vda?socket=$tap_socket" >/dev/null
    point=$("$afterimage" recovery-point create s --note "round $round" --wait --json </dev/null | json result.recoveryPoint)
    holds_all() {
        local status=0
        "$afterimage" recovery-point export s "$point" --to raw --output "$run_dir/point.raw" --wait </dev/null && cmp "$run_dir/point.raw" "$loop_device" || status=1
        rm -f "$run_dir/point.raw"
        return "$status"
    }
    check "on demand $round: it holds what was written before the request" holds_all
done
check "on demand: its note" is "$point" note "round 3"
check "on demand: it is marked as such" is "$point" isOnDemand True

# --- held ------------------------------------------------------------------------------------------------------------
check "hold" "$afterimage" recovery-point hold s "$point" --name "before the update"
check "hold: again, under the same name" "$afterimage" recovery-point hold s "$point" --name "before the update"
refuses "hold: under another name" "held as \"before the update\" already" "$afterimage" recovery-point hold s "$point" --name other
refuses "a held point is not deleted" "release it first" "$afterimage" recovery-point delete s "$point" --yes "$point"
refuses "release needs the name" "confirm it by that name" "$afterimage" recovery-point release s "$point"
refuses "release needs the right name" "confirm it by that name" "$afterimage" recovery-point release s "$point" --yes "$point"
first=$(points s | head -n 1 | cut -d' ' -f1)
refuses "delete needs the ID" "confirm it by its ID" "$afterimage" recovery-point delete s "$first"
check "delete" "$afterimage" recovery-point delete s "$first" --yes "$first"
check "delete: it is gone" gone "$first"

# --- the policy ------------------------------------------------------------------------------------------------------
refuses "a policy that makes no sense" "EVERY:FOR" "$afterimage" server set-policy s all
refuses "a policy that keeps nothing" "keeps nothing" "$afterimage" server set-policy s 2h:1h
check "set-policy" "$afterimage" server set-policy s all:2s,1h:24h
policy_is() { [ "$(server_field s policy)" = "$1" ] || { server_field s policy; return 1; }; }
check "set-policy: it is shown" policy_is all:2s,1h:24h
# At most those of 2 s, one or two of hours, the newest, and the points that somebody asked for.
is_thin() { [ "$(points s | wc -l)" -le 15 ]; }
until_true 30 point_count_is s 12 || true
check "points expire" until_true 60 is_thin
check "a held point stays" there "$point"
kill_now "$appliance_pid"
start_appliance
check "after a restart: the policy is still there" policy_is all:2s,1h:24h
until_true 60 server_state_is s Replicating || true
newest() { points s | tail -n 1 | sed 's/^rp-//; s/ .*//'; }
began=$(newest)
many_later() { [ "$(newest)" -ge $((began + 20)) ]; }
until_true 90 many_later || true
check "after a restart: points still expire" until_true 60 is_thin
check "after a restart: the held point is still there" is "$point" hold "before the update"
check "release" "$afterimage" recovery-point release s "$point" --yes "before the update"
check "release: it is held no more" is "$point" hold None
audited() {
    local events what
    events=$("$afterimage" event list --limit 200 </dev/null)
    for what in "Create Recovery Point" "Hold recovery point" "Release recovery point" "Delete recovery point" "Set Recovery Point Policy"; do
        grep -qF "$what" <<<"$events" || { echo "no event $what"; return 1; }
    done
}
check "all of it is in the audit log" audited
limited() { [ "$("$afterimage" recovery-point list s --limit 3 --json </dev/null | json -1.id)" = "$(points s | tail -n 1 | cut -d' ' -f1)" ]; }
"$afterimage" replication stop s </dev/null >/dev/null
check "a list with a limit ends with the newest" limited
unprotect
finish
