#!/usr/bin/env bash
# limit: 240
# The appliance loses its catalogue, its keys and every backup of them; its store is left. The agents have what it takes to go on.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product lost-catalogue
make_run_dir
store_elsewhere=$run_dir/store
protect 16
ai() { "$afterimage" "$@" </dev/null; }
ai replication start s --policy all:1h,1h:7d --epoch-ms 300 --wait >/dev/null
ai server set-alerts s --rpo-target 42s >/dev/null
has_copy() { ai agent configuration --state "$primary_state" >"$run_dir/copy.json" 2>/dev/null && grep -q "$1" "$run_dir/copy.json"; }
check "the agent has a copy" until_true 30 has_copy '"name" : "s"'
check "what changes is copied" until_true 90 has_copy '"rpoTargetSeconds" : 42'
no_secret() { ! grep -qiE 'secret|hash|token|BEGIN|serial' "$run_dir/copy.json"; }
check "no secret is in it" no_secret
mode_is() { [ "$(stat -c %a "$primary_state/configuration.json")" = 600 ]; }
check "nobody else reads it" mode_is
point=$(points s | tail -n 1 | cut -d' ' -f1)

kill_now "$appliance_pid"
rm -rf "$secondary_state"
mkdir "$secondary_state"
start_appliance
knows_nothing() { [ "$(ai server list --json)" = "[]" ] || [ "$(ai server list --json | tr -d ' \n')" = "[]" ]; }
check "a new appliance over the old store knows nothing of it" knows_nothing
echo '{}' >"$run_dir/none.json"
refuses "something else is not imported" "not a copy" "$afterimage" catalogue import "$run_dir/none.json"
check "the copy is imported" ai catalogue import "$run_dir/copy.json"
refuses "but once" "There is a server s already" "$afterimage" catalogue import "$run_dir/copy.json"
has_points() { points s | grep -q "^$point "; }
check "the recovery points are there" has_points
settings_are() { [ "$(server_field s policy) $(server_field s settings.epochMilliseconds) $(server_field s alertSettings.rpoTargetSeconds)" = "all:1h,1h:7d 300 42" ]; }
check "and the settings" settings_are
check "its agent is let in again" bash -c '"$1" agent enroll --token "$("$1" server token s --json | python3 -c "import json, sys; print(json.load(sys.stdin)[\"token\"])")" --state "$2"' _ "$afterimage" "$primary_state"
kill -TERM "$agent_pid"
until_true 20 process_gone "$agent_pid"
start_agent "$loop_device"
check "replication goes on" ai replication start s --wait
sent() { server_field s agent.resyncEqualBytes; }
compared() { [ "$(sent)" -gt $((8 << 20)) ]; }
check "only what differs was sent" compared
check "and a machine starts from a point of before" ai failover start s --yes s --point "$point" --memory 64 --wait
finish
