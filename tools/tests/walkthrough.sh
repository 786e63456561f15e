#!/usr/bin/env bash
# limit: 900
# The whole lifecycle once, as an operator goes through it: two sites in network namespaces of their own, a machine that boots and writes, and beside it dependent
# writes to its second disk, which are judged at each switch. What must be equal is compared block by block.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"
source "$repository/tools/lib/guest.sh"

need_product walkthrough
need_packages iproute2
make_run_dir

# --- two sites ----------------------------------------------------------------------------------------------------------
site=ai$(printf '%06x' $$) here=$(printf '10.%d.%d' $((64 + $$ / 256 % 64)) $(($$ % 256)))
primary=${site}p secondary=${site}s
for name in "$primary" "$secondary"; do
    ip netns add "$name"
    defer ip netns delete "$name"
    ip -n "$name" link set lo up
done
ip -n "$primary" link add wan type veth peer name wan netns "$secondary"
ip -n "$primary" address add "$here.1/30" dev wan
ip -n "$secondary" address add "$here.2/30" dev wan
ip -n "$primary" link set wan up
ip -n "$secondary" link set wan up
# Agents live at the primary site; the appliance, and whoever asks it, at the secondary.
program=$afterimage afterimage=$run_dir/afterimage
cat >"$afterimage" <<WRAPPER
#!/bin/sh
[ "\$1" = agent ] && site=$primary || site=$secondary
exec ip netns exec "\$site" "$program" "\$@"
WRAPPER
chmod 755 "$afterimage"
appliance_command() {
    appliance_command=("$afterimage" appliance --state "$secondary_state" --store "$store" --runtime-dir "$sockets" --listen "$here.2:8443" --link "$here.2:8444"
        --qemu "$AFTERIMAGE_QEMU" --accel tcg)
}
ai() { "$afterimage" "$@" </dev/null; }
field() { server_field s "$1"; }

# --- the machine and its disks --------------------------------------------------------------------------------------------
disk_file=$run_dir/disk.img second_file=$run_dir/second.img console=$run_dir/console log=$run_dir/chains
"$repository/tools/make-machine" --size 96 --output "$disk_file" >/dev/null
truncate -s 16M "$second_file"
attach_loop "$disk_file"
first=$loop_device
attach_loop "$second_file"
second=$loop_device
boot_check='serial:AFTERIMAGE-CHECK ok'
product_setup

boot_source() {
    tap_disk "$sockets/vda.sock" vda
    start_guest "$console" "${tap_disk[@]}"
    wait_console "$console" 120 '^AFTERIMAGE-CHECK ok' "$guest_pid"
}
start_chains() { # SOCKET
    start "$run_dir/chains.log" python3 "$repository/tools/lib/chains.py" write "$1" vdb "$log"
    chains_pid=$started_pid
}
stop_chains() {
    kill -TERM "$chains_pid" 2>/dev/null || true
    until_true 60 process_gone "$chains_pid" || kill_now "$chains_pid"
}
# chains_are_in SOURCE [--all] [--forget]: SOURCE is a file, a device or an NBD URI.
chains_are_in() {
    local image=$1
    shift
    if [[ $image = nbd* ]]; then
        qemu-img convert -f raw -O raw "$image" "$run_dir/judged.img" || return 1
        image=$run_dir/judged.img
    fi
    python3 "$repository/tools/lib/chains.py" check "$image" "$log" "$@" || return 1
}
point_uris() { ai recovery-point export s --point "$1" --json | python3 -c 'import json, sys; print(*json.load(sys.stdin)["uris"])'; }
chains_are_in_point() { # POINT [--all]
    local uris status=0
    uris=$(point_uris "$1")
    chains_are_in "${uris##* }" "${@:2}" || status=$?
    ai recovery-point unexport s --point "$1"
    return "$status"
}
disks_are_point() { # POINT
    local uris status=0
    uris=$(point_uris "$1")
    qemu-img compare -T none -f raw -F raw "${uris%% *}" "$first" && qemu-img compare -T none -f raw -F raw "${uris##* }" "$second" || status=1
    ai recovery-point unexport s --point "$1"
    return "$status"
}
newest_point() { points s | tail -n 1 | cut -d' ' -f1; }
machine_uri() { echo "nbd+unix:///$1?socket=$(field instances.-1.nbdSocketPath)"; }
machine_console() { field instances.-1.consolePath; }
machine_acknowledged() { sed 's/^/0 /' "$(machine_console)" | tr -d '\r' >"$run_dir/acknowledged" && last_acknowledged "$run_dir/acknowledged"; }
verdict_of_machine() { tr -d '\r' <"$(machine_console)" | grep -m 1 '^AFTERIMAGE-CHECK'; }
reaches() { [ "${1:-0}" -ge "${2:-0}" ] || { echo "record $2 was acknowledged, $1 is the newest here"; return 1; }; }
writes_more() { local before; before=$(machine_acknowledged); until_true 60 wrote_after $((before + 20)); }
wrote_after() { [ "$(machine_acknowledged)" -gt "$1" ]; }

# --- protect --------------------------------------------------------------------------------------------------------------
start_appliance
start_agent "$first" "$second"
check "the sites are apart: the appliance is reached by the network between them only" bash -c '! ip netns exec "$1" bash -c "exec 3<>/dev/tcp/127.0.0.1/8443" 2>/dev/null && ip netns exec "$1" bash -c "exec 3<>/dev/tcp/$2/8444"' _ "$primary" "$here.2"
enrol s
boot_source >/dev/null || true
check "the machine boots from its disks" console_line "$console" '^AFTERIMAGE-CHECK ok'
start_chains "$sockets/vdb.sock"
check "Start Replication" ai replication start s --policy all:1h --epoch-ms 300 --wait
check "Replicating" until_true 60 server_state_is s Replicating
sleep 2

# --- drill ------------------------------------------------------------------------------------------------------------------
check "Disaster Recovery Drill" ai drill start s --network isolated --boot-check "$boot_check" --memory 256 --wait
check "its point holds each chain's first writes, and none of the others" chains_are_in_point "$(field instances.0.recoveryPoint)"
check "replication goes on beside it" until_true 60 has_point_after s "$(now)"
check "Clear Test Failover Environment" ai drill clear s --wait

# --- failover, with the source dead ---------------------------------------------------------------------------------------------
sleep 1
read -r earlier cut < <(points s | tail -n 1)
before_earlier=$(last_acknowledged "$console" "$cut")
until_true 60 has_point_after s "$(now)"
kill_now "$guest_pid" "$agent_pid"
stop_chains
check "Failover, the source being dead" ai failover start s --boot-check "$boot_check" --memory 256 --yes s --wait
check "its machine holds each chain's first writes, and none of the others" chains_are_in "$(machine_uri vdb)"
line=$(verdict_of_machine)
check "and its own records, whole" reaches "$(check_field "$line" last)" "$before_earlier"
check "Change Recovery Point, to an earlier one" ai failover change-recovery-point s --point "$earlier" --boot-check "$boot_check" --memory 256 --yes s --wait
line=$(verdict_of_machine)
check "what was acknowledged before that point is there" reaches "$(check_field "$line" last)" "$before_earlier"
check "its chains, too; what came later is forgotten from here on" chains_are_in "$(machine_uri vdb)" --forget
check "Commit Failover" ai failover commit s --yes s
start_chains "$(field instances.0.nbdSocketPath)"
check "the machine writes on" writes_more

# --- the way back ----------------------------------------------------------------------------------------------------------------
rescue_state=$run_dir/rescue
token=$(ai reverse register s --json | json token)
check "Reversed Register" ai agent enroll --token "$token" --state "$rescue_state"
start "$run_dir/rescue.log" "$afterimage" agent rescue --state "$rescue_state" --disk "vda=$first" --disk "vdb=$second"
rescue_pid=$started_pid
check "the original disks are there" until_true 60 server_state_is s "Reversed Initialized"
check "Initiate Reverse Replication, Original machine recovery" ai reverse start s --original-machine --confirm "$first" --confirm "$second"
check "Reversed Replicating, while the machine writes" until_true 240 server_state_is s "Reversed Replicating"
kept=$(field reverse.originalPoint)
check "what the disks held is a recovery point" [ -n "$kept" ]
check "the machine writes on" writes_more
stop_chains
acknowledged=$(machine_acknowledged)
machine=$(field instances.0.id)
check "Failback" ai failback start s --forced --yes s --wait
check "Failed Back" until_true 60 server_state_is s "Failed Back"
check "nothing runs at the secondary site" bash -c '! pgrep -f -- "-name afterimage-$1" >/dev/null' _ "$machine"
check "the original disks hold every write that the chains had acknowledged" chains_are_in "$second" --all
check "both disks are the handed-over point, block by block" disks_are_point "$(newest_point)"
kill -TERM "$rescue_pid"
until_true 60 process_gone "$rescue_pid"

# --- protected again ----------------------------------------------------------------------------------------------------------------
primary_state=$run_dir/again
token=$(ai registration s --json | json token)
check "Registration" ai agent enroll --token "$token" --state "$primary_state"
start_agent "$first" "$second"
check "Initialized" until_true 60 server_state_is s Initialized
check "replication starts again" ai replication start s --wait
check "nothing had to be sent" [ "$(field agent.sentBytes)" = 0 ]
boot_source >/dev/null || true
check "the original machine boots from its disks" console_line "$console" '^AFTERIMAGE-CHECK ok'
line=$(console_line "$console" '^AFTERIMAGE-CHECK ok')
check "everything that it had acknowledged at the secondary site is there" reaches "$(check_field "$line" last)" "$acknowledged"
start_chains "$sockets/vdb.sock"
sleep 3
before=$(last_acknowledged "$console" "$(points s | tail -n 1 | cut -d' ' -f2)")
check "points follow" until_true 60 has_point_after s "$(now)"

# --- a second failover ---------------------------------------------------------------------------------------------------------------
kill_now "$guest_pid" "$agent_pid"
stop_chains
check "a second Failover" ai failover start s --boot-check "$boot_check" --memory 256 --yes s --wait
check "its machine holds each chain's first writes, and none of the others" chains_are_in "$(machine_uri vdb)"
line=$(verdict_of_machine)
check "and its own records, whole" reaches "$(check_field "$line" last)" "$before"
check "what the original disks held in the first place is still there" bash -c '"$1" recovery-point list s --json | grep -q "\"$2\""' _ "$afterimage" "$kept"
finish
