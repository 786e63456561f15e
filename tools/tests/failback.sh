#!/usr/bin/env bash
# limit: 600
# The way back: failed over with the source dead, committed, written to; back onto the original disk, by what differs; failed back; protected again; failed
# over again. What must be equal is compared byte by byte. Either side is killed on the way, and the old source comes back at each stage.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"
source "$repository/tools/lib/way-back.sh"

need_product failback
make_run_dir
protect 24
rescue_state=$run_dir/rescue new_state=$run_dir/new original=$run_dir/original.img
token_of() { ai "$@" --json | json token; }
start_rescue() {
    start "$run_dir/rescue.log" "$afterimage" agent rescue --state "$rescue_state" --disk "vda=$loop_device"
    rescue_pid=$started_pid
}
rescue_is_there() { [ "$(field reverse.isConnected)" = True ]; }
machine_runs() { pgrep -f -- "-name afterimage-$machine" >/dev/null && [ "$(field instances.0.step)" = ready ]; }
start_machine_writer() {
    start "$run_dir/writer.log" python3 "$repository/tools/lib/nbd.py" write "$(machine_socket)" vda --seed "$RANDOM"
    writer_pid=$started_pid
}

# --- failed over, with the source dead ------------------------------------------------------------------------------------
ai replication start s --policy all:1h --epoch-ms 300 --wait >/dev/null
start_writer
sleep 1
stop_writer
check "what was written is there" exact_after "$(date +%s.%N)"
kill_now "$agent_pid"
# What the source writes after its last recovery point: nobody else has it.
dd if=/dev/urandom of="$loop_device" bs=4096 count=40 seek=1000 conv=notrunc,fsync status=none
cp "$disk_file" "$original"
refuses "registering what runs at its source" "does not run here" "$afterimage" reverse register s
check "failover" ai failover start s --memory 64 --wait --yes s
machine=$(field instances.0.id)
start_agent "$loop_device"
check "the old source returns: fenced, and told" until_true 60 grep -q "fenced: this server was failed over" "$run_dir/agent.log"
kill -TERM "$agent_pid"
until_true 30 process_gone "$agent_pid"
refuses "registering before the commit" "Commit the failover first" "$afterimage" reverse register s
check "commit" ai failover commit s --yes s
start_machine_writer
sleep 1
stop_writer

# --- registered -------------------------------------------------------------------------------------------------------------
refuses "reverse replication before disks are registered" "Register the disks" "$afterimage" reverse start s --original-machine
refuses "a failback from here" "only in Reversed Replicating" "$afterimage" failback start s --yes s
token=$(token_of reverse register s)
check "reversed register" [ -n "$token" ]
check "enrolled by a certificate of its own" ai agent enroll --token "$token" --state "$rescue_state"
start_agent "$loop_device"
check "the old source returns with its old certificate: not let in, and told" until_true 60 grep -q "enrolled again since under another certificate" "$run_dir/agent.log"
refuses "rescue of a disk that an agent has" "another program holds it|another program has locked it" "$afterimage" agent rescue --state "$rescue_state" --disk "vda=$loop_device"
kill -TERM "$agent_pid"
until_true 30 process_gone "$agent_pid"
truncate -s 8M "$run_dir/small.img"
start "$run_dir/rescue.log" "$afterimage" agent rescue --state "$rescue_state" --disk "vda=$run_dir/small.img"
check "a disk that is too small is not taken" until_true 60 bash -c '"$1" server show s --json | grep -q "disk vda needs"' _ "$afterimage"
kill -TERM "$started_pid"
until_true 30 process_gone "$started_pid"
start_rescue
check "the original disk is there" until_true 60 server_state_is s "Reversed Initialized"
refuses "overwriting without the disk's confirmation" "confirm each by its serial" "$afterimage" reverse start s --original-machine
refuses "overwriting with another's" "confirm each by its serial" "$afterimage" reverse start s --original-machine --confirm /dev/sda
refuses "without saying what is overwritten" "original-machine" "$afterimage" reverse start s --confirm "$loop_device"
disk_is_untouched() { cmp "$original" "$loop_device"; }
check "nothing was written to it" disk_is_untouched

# --- reverse replication ----------------------------------------------------------------------------------------------------
qemu-img convert -f raw -O raw "$(machine_uri)" "$run_dir/machine.img"
differing=$(python3 - "$original" "$run_dir/machine.img" <<'PYTHON'
import sys
a, b = (open(path, "rb").read() for path in sys.argv[1:])
print(sum(4096 for i in range(0, len(a), 4096) if a[i:i + 4096] != b[i:i + 4096]))
PYTHON
)
ai reverse start s --original-machine --confirm "$loop_device" >/dev/null
kill_now "$appliance_pid"
start_appliance
check "the appliance is killed as reverse replication begins: it goes on" until_true 60 rescue_is_there
kill_now "$rescue_pid"
start_rescue
check "so does the agent" until_true 120 server_state_is s "Reversed Replicating"
check "the original disk is what runs here, byte by byte" disk_is_machine
sent=$(field reverse.sentBytes)
printf 'differing %s bytes, sent %s\n' "$differing" "$sent"
check "only what differs was sent" [ $((sent * 10)) -le $((differing * 11)) ]
kept=$(field reverse.originalPoint)
held_as_original() { ai recovery-point list s --json | grep -q '"hold" : "original-'; }
check "what it held is kept as a held recovery point" held_as_original
check "byte by byte" point_is "$kept" "$original"
refuses "forward replication now" "Not while|failed over" "$afterimage" replication start s

# --- killed -----------------------------------------------------------------------------------------------------------------
start_machine_writer
sleep 1
kill_now "$appliance_pid"
start_appliance
check "the appliance is killed: the disks follow again" until_true 90 follows
kill_now "$rescue_pid"
check "the agent is killed: said so" until_true 60 bash -c '"$1" server show s | grep -q "rescue agent is not connected"' _ "$afterimage"
refuses "a failback without the disks" "do not follow now" "$afterimage" failback start s --yes s
start_rescue
check "and the disks follow again" until_true 90 follows
stop_writer
equal_again() { disk_is_machine >/dev/null; }
check "the disk comes to be what runs here" until_true 90 equal_again

# --- failback ---------------------------------------------------------------------------------------------------------------
refuses "a failback without its confirmation" "confirmed by its name" "$afterimage" failback start s
ai failback start s --yes s >/dev/null
check "a failback begins" server_state_is s "Failback In Progress"
kill_now "$appliance_pid"
start_appliance
check "the appliance is killed while the machine is asked to shut down: the failback goes on" server_state_is s "Failback In Progress"
check "and the machine runs until it does" until_true 30 bash -c 'pgrep -f -- "-name afterimage-$1" >/dev/null' _ "$machine"
check "and is cancelled" ai failback cancel s
check "the machine runs here, nothing is lost" until_true 60 machine_runs
check "Reversed Replicating again" server_state_is s "Reversed Replicating"
check "the disks follow" until_true 60 follows
start_machine_writer
sleep 1
stop_writer
qemu-img convert -f raw -O raw "$(machine_uri)" "$run_dir/machine.img"
ai failback start s --forced --yes s >/dev/null
kill_now "$appliance_pid"
start_appliance
check "the appliance is killed in a failback: it ends all the same" until_true 120 server_state_is s "Failed Back"
check "the disk has everything that was written here, byte by byte" disk_is "$run_dir/machine.img"
no_machine() { ! pgrep -f -- "-name afterimage-$machine" >/dev/null && [ "$(field instances)" = "[]" ]; }
check "no machine is left here" until_true 60 no_machine
check "a recovery point of it is" point_is "$(points s | tail -n 1 | cut -d' ' -f1)" "$run_dir/machine.img"
check "the agent says what to do" until_true 30 grep -q "the disks hold everything" "$run_dir/rescue.log"
refuses "starting the machine here" "Not while" "$afterimage" failover start-machine s
kill -TERM "$rescue_pid"
until_true 30 process_gone "$rescue_pid"

# --- registered, protected, failed over again ---------------------------------------------------------------------------------
start_agent "$loop_device"
check "the source is not let in with its old certificate" until_true 60 bash -c 'tail -n 3 "$1" | grep -q "another certificate"' _ "$run_dir/agent.log"
kill -TERM "$agent_pid"
until_true 30 process_gone "$agent_pid"
check "registration" bash -c '"$1" agent enroll --token "$("$1" registration s --json | python3 -c "import json, sys; print(json.load(sys.stdin)[\"token\"])")" --state "$2"' _ "$afterimage" "$new_state"
primary_state=$new_state
start_agent "$loop_device"
check "Initialized" until_true 60 server_state_is s Initialized
check "replication" ai replication start s --wait
check "nothing had to be sent" [ "$(field agent.sentBytes)" = 0 ]
start_writer
sleep 1
stop_writer
check "what is written is followed" exact_after "$(date +%s.%N)"
cp "$disk_file" "$original"
kill_now "$agent_pid"
check "a second failover" ai failover start s --memory 64 --wait --yes s
check "its machine has what the source had" disk_is_machine
check "the original that was kept is still there" held_as_original
finish
