#!/usr/bin/env bash
# limit: 600
# SIGKILL of the agent, of the appliance or of both, during the initial full sync and while replicating: after a restart
# replication goes on by itself, and the next recovery point is exact. The writer never sees more than its own server's death.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product sigkill
make_run_dir
size=256

syncing() {
    local view
    view=$(server_json s)
    [ "$(json state <<<"$view")" = "Initial Full Sync" ] && [ "$(json agent.fullSyncDoneBytes <<<"$view")" -gt 0 ]
}
followed() { server_state_is s Replicating && [ -n "$(points s)" ]; }

# scenario WHO PHASE
scenario() {
    local who=$1 phase=$2 name stopped interruptions
    name="killed $who during $phase"
    protect "$size"
    start_writer
    if [ "$phase" = "Initial Full Sync" ]; then
        "$afterimage" replication start s --throttle 24MiB </dev/null >/dev/null
        until_true 30 syncing || { not_ok "$name" "the full sync did not start: $(server_field s state), $(server_field s reason)"; unprotect; return; }
    else
        "$afterimage" replication start s </dev/null >/dev/null
        until_true 90 followed || { not_ok "$name" "it did not reach Replicating: $(server_field s state), $(server_field s reason)"; unprotect; return; }
    fi
    case $who in
    agent) kill_now "$agent_pid" ;;
    appliance) kill_now "$appliance_pid" ;;
    both) kill_now "$agent_pid" "$appliance_pid" ;;
    esac
    [ "$who" = agent ] || start_appliance
    [ "$who" = appliance ] || start_agent "$loop_device"
    [ "$phase" != "Initial Full Sync" ] || "$afterimage" status </dev/null >/dev/null
    if until_true 120 followed; then ok "$name: replication goes on by itself"; else
        not_ok "$name: replication goes on by itself" "$(server_field s state), $(server_field s reason)"
        show_logs
        unprotect
        return
    fi
    stop_writer || not_ok "$name" "the writer hangs"
    stopped=$(now)
    check "$name: the next recovery point is exact" exact_after "$stopped"
    interruptions=$(sed -n 's/.*interruptions=//p' <<<"$writer_said")
    if [ "$who" = appliance ]; then
        [ "$interruptions" = 0 ] && ok "$name: the writer noticed nothing" || not_ok "$name: the writer noticed nothing" "$writer_said"
    fi
    unprotect
}

for phase in "Initial Full Sync" Replicating; do
    for who in agent appliance both; do scenario "$who" "$phase"; done
done
finish
