#!/usr/bin/env bash
# limit: 420
# A graceful failover, while the machine at the source writes as fast as it can: the recovery point has every write that was answered, and none is answered
# after it. Whatever goes wrong on the way is rolled back, and the source writes on.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product graceful-failover
make_run_dir
protect 24
ai() { "$afterimage" "$@" </dev/null; }
agent_says() { grep -q -- "$1" "$run_dir/agent.log"; }
agent_said() { grep -c -- "$1" "$run_dir/agent.log"; }
disk_sum() { sha256sum <"$loop_device"; }
disk_changes() { local before; before=$(disk_sum); sleep 0.5; [ "$(disk_sum)" != "$before" ]; }
disk_stands() { ! disk_changes; }
task_failed_with() { ai task list --server s --limit 1 --json | json 0.error | grep -qE -- "$1"; }
held() { [ "$(agent_said "writes are held: ")" -gt "$1" ]; }
# throttled FACTOR: replication with so little room that the last recovery point takes a while
throttled() {
    ai replication stop s >/dev/null 2>&1 || true # not at first
    ai replication start s --throttle "$1" --epoch-ms 300 --policy all:1h --wait >/dev/null
    until_true 90 server_state_is s Replicating
}

throttled 0
start_writer
point_before=$(points s | tail -n 1 | cut -d' ' -f1)
refuses "a named point" "no other can be named" "$afterimage" failover start s --graceful --point "$point_before" --yes s
refuses "a graceful drill" "unknown option|Unknown option" "$afterimage" drill start s --graceful

# --- what goes wrong is rolled back ---------------------------------------------------------------------------------------
# begin_slowly: a graceful failover whose last recovery point takes seconds
begin_slowly() {
    local holds
    holds=$(agent_said "writes are held: " || true)
    sleep 1
    ai failover start s --graceful --memory 64 --yes s >/dev/null
    until_true 30 held "$holds"
}
rolled_back() { until_true 60 task_failed_with "$1" && until_true 90 server_state_is s Replicating && until_true 30 disk_changes; }

check "the point takes a while" throttled 256KiB
check "begun" begin_slowly
check "nothing is written while the writes are held" disk_stands
kill_now "$appliance_pid"
start_appliance
check "the appliance is killed: rolled back, the source writes on" rolled_back "restarted before the last recovery point"

check "begun again" begin_slowly
kill -STOP "$appliance_pid"
check "the appliance is silent: the source lets go by itself" until_true 60 agent_says "has not repeated it"
check "and writes" until_true 20 disk_changes
kill -CONT "$appliance_pid"
check "the appliance is back: rolled back, not failed over without these writes" rolled_back "."

check "and again" begin_slowly
kill_now "$agent_pid"
check "the agent is killed: the task fails" until_true 90 task_failed_with "let go|not connected|did not happen"
start_agent "$loop_device"
check "rolled back" until_true 30 bash -c '! grep -q "Failover In Progress" <("$1" server show s --json)' _ "$afterimage"

# --- done ---------------------------------------------------------------------------------------------------------------
check "replication goes on" throttled 0
check "the source writes on" until_true 30 disk_changes
check "the graceful failover" ai failover start s --graceful --memory 64 --wait --yes s
check "the server is failed over" server_state_is s "Failed Over"
check "the source writes no more" disk_stands
point=$(server_field s instances.0.recoveryPoint)
point_is_disk() {
    local uri status=0
    uri=$(export_uri "$point")
    qemu-img compare -T none -f raw -F raw "$uri" "$loop_device" 2>&1 || status=$?
    "$afterimage" recovery-point unexport s --point "$point" </dev/null
    return "$status"
}
check "the machine's recovery point is the source's disk, byte by byte" point_is_disk
kill_now "$appliance_pid"
start_appliance
check "the source still holds when the appliance comes back" disk_stands
kill -TERM "$agent_pid"
check "an agent that is stopped ends, with its writes unanswered" until_true 20 process_gone "$agent_pid"
check "the recovery point is still the disk" point_is_disk
kill_now "$writer_pid"
finish
