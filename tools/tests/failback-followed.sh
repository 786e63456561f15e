#!/usr/bin/env bash
# limit: 600
# The way back where the live tap has followed the original disk all the time, past the failover: what it wrote is known block by block, so neither side reads
# more than what was written. And where that is not so, it is found out: the whole disk is compared.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"
source "$repository/tools/lib/way-back.sh"

need_product failback-followed
[ -r /sys/kernel/btf/vmlinux ] || { skip failback-followed "this kernel does not describe its types: no live tap"; finish; }
make_run_dir
keep_bpffs
agent_tap=live
protect 64
rescue_state=$run_dir/rescue original=$run_dir/original.img
start_rescue() {
    start "$run_dir/rescue.log" "$afterimage" agent rescue --state "$rescue_state" --followed-by "$primary_state" --disk "vda=$loop_device"
    rescue_pid=$started_pid
}
end_rescue() { kill -TERM "$rescue_pid" && until_true 30 process_gone "$rescue_pid"; }
dirty() { dd if=/dev/urandom of="$1" bs=4096 count="$2" seek="$3" conv=notrunc,fsync status=none; }
machine_writes() { # SEED SECONDS: through the machine's disk
    start "$run_dir/writer.log" python3 "$repository/tools/lib/nbd.py" write "$(machine_socket)" vda --seed "$1"
    writer_pid=$started_pid
    sleep "$2"
    stop_writer
}
bytes_differing() { # FILE FILE
    python3 - "$@" <<'PYTHON'
import sys
a, b = (open(path, "rb").read() for path in sys.argv[1:])
print(sum(4096 for i in range(0, len(a), 4096) if a[i:i + 4096] != b[i:i + 4096]))
PYTHON
}
# failed_over: replicated, failed over and committed, with writes on the original after its last recovery point, and on the machine before and after the commit.
failed_over() {
    ai replication start s --policy all:1h --epoch-ms 300 --wait >/dev/null
    dirty "$loop_device" 100 2000
    check "what was written is there" exact_after "$(date +%s.%N)"
    check "failover" ai failover start s --memory 64 --wait --yes s
    machine=$(field instances.0.id)
    check "the source is told" until_true 60 grep -q "fenced: this server was failed over" "$run_dir/agent.log"
    dirty "$loop_device" 40 1000
    machine_writes 5 1
    check "commit" ai failover commit s --yes s
    # Where no process looks.
    kill_now "$agent_pid"
    dirty "$loop_device" 24 5000
    machine_writes 6 1
}
registered() {
    ai agent enroll --token "$(ai reverse register s --json | json token)" --state "$rescue_state" >/dev/null
    start_rescue
    check "$1: the original disk is there" until_true 60 server_state_is s "Reversed Initialized"
}

failed_over
registered "followed"
check "the agent says that the disk was followed" grep -q "has followed the disks until now" "$run_dir/rescue.log"
refuses "the agent that followed it, meanwhile" "another agent is running" "${agent_command[@]}"
known_by_preview() { ai reverse start s --original-machine --preview | grep -q "known from their live tap"; }
check "so does the preview" known_by_preview
cp "$disk_file" "$original"
ai reverse start s --original-machine --confirm "$loop_device" >/dev/null
check "Reversed Replicating" until_true 120 server_state_is s "Reversed Replicating"
check "the original disk is what runs here, byte by byte" disk_is_machine
qemu-img convert -f raw -O raw "$(machine_uri)" "$run_dir/machine.img"
differing=$(bytes_differing "$original" "$run_dir/machine.img") sent=$(field reverse.sentBytes) compared=$(field reverse.comparedBytes)
read_bytes=$(awk '/^rchar|^read_bytes/ { n += $2 } END { print n }' "/proc/$rescue_pid/io")
printf 'differing %s bytes, sent %s, compared %s, read by the agent %s\n' "$differing" "$sent" "$compared" "$read_bytes"
check "only what differs was sent" [ $((sent * 10)) -le $((differing * 11)) ]
check "nothing was compared" [ "$compared" = 0 ]
check "the agent has read less than half of the disk" [ "$read_bytes" -lt $((32 << 20)) ]
kept=$(field reverse.originalPoint)
check "what it held is kept" point_is "$kept" "$original"
not_compared() { ! grep -q "is compared, and only what differs is sent" "$run_dir/rescue.log"; }
check "to keep it nothing was compared" not_compared

# The line and the appliance go away, the machine writes on.
kill_now "$appliance_pid"
start_appliance
check "the appliance is killed: the disks follow again" until_true 90 follows
machine_writes 7 1
check "the disk comes to be what runs here" until_true 90 disk_is_machine

# Somebody writes to the disk while no agent holds it: a new one does not know what it is.
end_rescue
dirty "$loop_device" 8 12000
start_rescue
check "the disks follow again" until_true 120 follows
check "what somebody else wrote to it is gone" until_true 90 disk_is_machine
check "for it was compared as a whole" [ "$(field reverse.comparedBytes)" -ge $((64 << 20)) ]

ai failback start s --forced --yes s >/dev/null
check "Failed Back" until_true 120 server_state_is s "Failed Back"
end_rescue

# --- followed by an agent whose tap is gone: the disk is compared --------------------------------------------------------------
new_state=$run_dir/new
check "registration" bash -c '"$1" agent enroll --token "$("$1" registration s --json | python3 -c "import json, sys; print(json.load(sys.stdin)[\"token\"])")" --state "$2"' _ "$afterimage" "$new_state"
ai agent detach --state "$primary_state"
primary_state=$new_state will_detach=
start_agent "$loop_device"
check "Initialized" until_true 60 server_state_is s Initialized
failed_over
ai agent detach --state "$primary_state"
dirty "$loop_device" 8 9000
cp "$disk_file" "$original"
registered "its tap is gone"
check "the agent says that it has to compare" grep -q "has to be found by comparing" "$run_dir/rescue.log"
ai reverse start s --original-machine --confirm "$loop_device" >/dev/null
check "its tap is gone: Reversed Replicating" until_true 120 server_state_is s "Reversed Replicating"
check "its tap is gone: the original disk is what runs here" disk_is_machine
check "its tap is gone: what it held is kept" point_is "$(field reverse.originalPoint)" "$original"
# One process has held it since: read once, to keep it.
check "it was compared once" [ "$(field reverse.comparedBytes)" -lt $((32 << 20)) ]
end_rescue
finish
