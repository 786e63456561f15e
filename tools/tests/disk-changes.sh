#!/usr/bin/env bash
# limit: 480
# The disks of a protected host change: one is added, one is missing and comes back, their order is another, one grows, one turns up on the host. What can go on goes on by itself; what
# cannot is said, with what to do.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product disk-changes
[ -e /sys/kernel/btf/vmlinux ] || { skip disk-changes "the live tap needs a kernel with BTF"; finish; }
make_run_dir
agent_tap=live
protect 24
first_device=$loop_device
head -c 16M /dev/urandom >"$run_dir/second.img"
attach_loop "$run_dir/second.img"
second_device=$loop_device

restart_agent() { # DEVICE...
    kill -TERM "$agent_pid" && until_true 30 process_gone "$agent_pid" || return 1
    start_agent "$@"
}
# Both disks get something new; the next recovery point must have it, on both.
write_both() {
    head -c 1M /dev/urandom | dd of="$first_device" bs=64K seek=40 oflag=direct status=none
    head -c 1M /dev/urandom | dd of="$second_device" bs=64K seek=80 oflag=direct status=none
}
copy_is() { # POINT DISK FILE
    local status=0 copy
    copy=$(mktemp -u "$run_dir/copy.XXXXXX")
    timeout 60 "$afterimage" recovery-point export s "$1" --to raw --output "$copy" --disk "$2" --wait </dev/null && cmp "$copy" "$3" || status=1
    rm -f "$copy"
    return "$status"
}
both_exact_after() {
    until_true 90 has_point_after s "$1" || { echo "no recovery point after that: $(server_field s state), $(server_field s reason)"; return 1; }
    local point
    point=$(point_after s "$1")
    copy_is "$point" vda "$first_device" && copy_is "$point" vdb "$second_device"
}
reason_says() { server_field s reason | grep -q -- "$1" || { echo "it is $(server_field s state), and says: $(server_field s reason)"; return 1; }; }
abnormal() { until_true 60 server_state_is s Abnormal && reason_says "$1"; }
audited() { "$afterimage" event list --json </dev/null | grep -q "$1"; }

"$afterimage" replication start s --policy all:1h --wait </dev/null >/dev/null
old=$(points s | tail -n 1 | cut -d' ' -f1)

# --- one is added ------------------------------------------------------------------------------------------------------
restart_agent "$first_device" "$second_device"
check "a disk is added: replication goes on by itself" until_true 90 server_state_is s Replicating
write_both
check "a disk is added: the next recovery point has both" both_exact_after "$(now)"
check "a disk is added: the audit log says so" audited "Add disk"
refuses "a point from before does not have it" "no disk vdb" "$afterimage" recovery-point export s "$old" --to raw --output "$run_dir/none.raw" --disk vdb
check "a machine from a point of before" "$afterimage" drill start s --point "$old" --memory 64 --wait
check "it ends" "$afterimage" drill clear s --wait

# --- one is missing ----------------------------------------------------------------------------------------------------
restart_agent "$first_device"
check "a disk is missing: Abnormal, which one, and what to do" abnormal "disk vdb is protected.*--disk vdb="
write_both
restart_agent "$first_device" "$second_device"
check "it is back: replication goes on by itself" until_true 90 server_state_is s Replicating
check "it is back: the next recovery point has both" both_exact_after "$(now)"

# --- another order ------------------------------------------------------------------------------------------------------
agent_options=(--disk "vdb=$second_device")
restart_agent "$first_device"
agent_options=()
check "another order: Abnormal, and which one is right" abnormal "protected are vda, vdb"
check "stopped while Abnormal" "$afterimage" replication stop s
restart_agent "$first_device" "$second_device"
check "stopped while Abnormal: it does not go on by itself" until_true 60 server_state_is s Initialized
write_both
check "started again" "$afterimage" replication start s --wait
check "started again: the next recovery point has both" both_exact_after "$(now)"

# --- paused, and begun anew --------------------------------------------------------------------------------------------
paused() { until_true 30 server_state_is s "Replication Interrupted" && reason_says "paused by"; }
stays_paused() { local count; count=$(points s | wc -l); sleep 3; [ "$(points s | wc -l)" = "$count" ] && paused; }
went_on_without_comparing() { tail -n 4 "$run_dir/agent.log" | grep -q "replication goes on from epoch"; }
check "paused" "$afterimage" replication pause s
check "paused: nothing follows, and it says so" stays_paused
write_both
restart_agent "$first_device" "$second_device"
check "paused: it outlives a restart of the agent" stays_paused
kill_now "$appliance_pid"
start_appliance
check "paused: it outlives a restart of the appliance" stays_paused
refuses "a drill while it is paused" "only in Replicating" "$afterimage" drill start s
check "resumed" "$afterimage" replication resume s --wait
check "resumed: only what was written meanwhile was sent" went_on_without_comparing
check "resumed: the next recovery point has both" both_exact_after "$(now)"
refuses "resumed twice" "is not paused" "$afterimage" replication resume s
check "Restart Server" "$afterimage" server restart s
began_anew() { grep -q "asks to begin anew" "$run_dir/agent.log" && server_state_is s Replicating; }
check "it begins anew, and goes on" until_true 60 began_anew
write_both
check "begun anew: the next recovery point has both" both_exact_after "$(now)"

# --- a disk grows ----------------------------------------------------------------------------------------------------------
# grows DEVICE FILE BYTES: and is written past its old end at once.
grows() {
    local old
    old=$(stat -c %s "$2")
    truncate -s "$3" "$2"
    losetup -c "$1"
    dd if=/dev/urandom of="$1" bs=512 seek=$((old / 512)) count=$((($3 - old) / 512)) oflag=direct status=none
}
sizes_are() { # AS THE AGENT SAID: BYTES OF vda, OF vdb
    [ "$(server_json s | python3 -c 'import json, sys; print(*(d["geometry"]["sizeBytes"] for d in json.load(sys.stdin)["disks"]))')" = "$*" ] || { server_json s | json disks; return 1; }
}
agent_said() { grep -q -- "$1" "$run_dir/agent.log"; }
write_both
before=$(now)
until_true 90 has_point_after s "$before" || true
small=$(point_after s "$before")
cp "$run_dir/second.img" "$run_dir/small.img"
# 20 MiB and a sector: its last block is not whole, and the next time that grows, too.
grows "$second_device" "$run_dir/second.img" $(((20 << 20) + 512))
time=$(now)
check "a disk grows, and is written past its old end: the agent says so, and what it does" until_true 30 agent_said "disk vdb had 16777216 bytes and has 20972032 now: it is attached anew, and compared with the replica"
check "a disk grows: the first recovery point after that write has all of it" both_exact_after "$time"
check "a disk grows: replication goes on by itself" until_true 30 server_state_is s Replicating
check "a disk grows: the server has its size" sizes_are $((24 << 20)) 20972032
check "a point from before has the old one, and what was in it" copy_is "$small" vdb "$run_dir/small.img"
rm -f "$run_dir/small.img"
grows "$second_device" "$run_dir/second.img" $((21 << 20))
check "and again, from within a block" both_exact_after "$(now)"
truncate -s 26M "$disk_file"
losetup -c "$first_device"
check "a disk grows and nothing is written there: the next recovery point has its size" until_true 30 sizes_are $((26 << 20)) $((21 << 20))
check "and is the disk" both_exact_after "$(now)"
kill -TERM "$agent_pid"
until_true 30 process_gone "$agent_pid" || true
grows "$first_device" "$disk_file" $((28 << 20))
write_both
start_agent "$first_device" "$second_device"
check "a disk grows while no agent runs: replication goes on by itself" until_true 90 server_state_is s Replicating
check "a disk grows while no agent runs: the next recovery point has all of it" both_exact_after "$(now)"
check "paused" "$afterimage" replication pause s
grows "$second_device" "$run_dir/second.img" $((22 << 20))
check "a disk grows while replication is paused: it stays so" stays_paused
check "resumed" "$afterimage" replication resume s --wait
check "resumed: the next recovery point has all of it" both_exact_after "$(now)"

# --- a disk turns up on the host -----------------------------------------------------------------------------------------
head -c 8M /dev/urandom >"$run_dir/third.img"
attach_loop "$run_dir/third.img"
third_device=$loop_device
head -c 8M /dev/urandom >"$run_dir/fourth.img"
attach_loop "$run_dir/fourth.img"
fourth_device=$loop_device
ai() { "$afterimage" "$@" </dev/null; }
new_disk_is() { [ "$(server_field s newDisks.0.path)" = "$1" ]; }
alerts_of() { ai status --json | python3 -c 'import json, sys; print(*(a["text"] for a in json.load(sys.stdin)["alerts"] if a["kind"] == "new-disk"))'; }
disk_names_are() { [ "$(server_json s | python3 -c 'import json, sys; print(*json.load(sys.stdin)["settings"]["disks"])')" = "$*" ] && server_state_is s Replicating; }
exact_with_third() {
    both_exact_after "$1" || return 1
    copy_is "$(point_after s "$1")" vdc "$third_device"
}
agent_options=(--watch-device "$third_device")
restart_agent "$first_device" "$second_device"
check "a disk turns up on the host: it is said" until_true 60 new_disk_is "$third_device"
check "by an alert, with what to do" grep -q "server add-disk s $third_device" <(alerts_of)
check "replication goes on without it" until_true 60 disk_names_are vda vdb
refuses "a disk that the host has not" "has no disk /dev/nothere" "$afterimage" server add-disk s /dev/nothere
refuses "a name that is taken" "has a disk vda already" "$afterimage" server add-disk s "$third_device" --name vda
check "left out" ai server leave-out-disk s "$third_device"
check "left out: nobody is told any more" [ -z "$(alerts_of)" ]
check "added all the same" ai server add-disk s "$third_device" --name vdc
check "added: it is protected, too" until_true 90 disk_names_are vda vdb vdc
write_both
check "added: the next recovery point has all three" exact_with_third "$(now)"
agent_options=()
restart_agent "$first_device" "$second_device"
check "added: the agent knows it after a restart" until_true 90 disk_names_are vda vdb vdc
check "by policy" ai replication set s --new-disks add
agent_options=(--watch-device "$fourth_device")
restart_agent "$first_device" "$second_device"
check "by policy: what turns up is protected by itself" until_true 120 disk_names_are vda vdb vdc "${fourth_device##*/}"
check "by policy: the audit log says who" audited "Protect disk"

kill -TERM "$agent_pid"
until_true 30 server_state_is s "Replication Interrupted" || true
refuses "Restart Server without its agent" "not connected" "$afterimage" server restart s
finish
