#!/usr/bin/env bash
# limit: 300
# A protected host's agent is replaced by another version of the program while the disk is written to: ended first, or killed. Nothing is copied again, every
# write is there. If what the earlier version left in the kernel is not the later one's, everything is compared, and only what differs is sent.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product agent-upgrade
[ -e /sys/kernel/btf/vmlinux ] || { skip agent-upgrade "the live tap needs a kernel with BTF"; finish; }
make_run_dir
keep_bpffs
agent_tap=live
protect 64
"$afterimage" replication start s --policy all:1h --wait </dev/null >/dev/null

# Another file with other bytes, elsewhere: all that an upgrade is to the kernel and to the state directory.
first=$afterimage second=$run_dir/next/afterimage
mkdir "$run_dir/next"
cp "$first" "$second"
printf 'another build' >>"$second"

start_load() {
    start "$run_dir/load.log" fio --name=load --filename="$loop_device" --rw=randwrite --bs=4k --ioengine=io_uring --direct=1 --iodepth=8 --rate_iops=1500 --time_based --runtime=600 \
        --norandommap --randrepeat=0
    load_pid=$started_pid
    until_true 30 is_written_to || { tail -n 3 "$run_dir/load.log"; return 1; }
}
is_written_to() { local before; before=$(awk '{ print $5 }' "/sys/block/${loop_device##*/}/stat"); sleep 0.5; [ "$(awk '{ print $5 }' "/sys/block/${loop_device##*/}/stat")" -gt "$before" ]; }
load_pid=
end_load() { kill -INT "$load_pid" && until_true 30 process_gone "$load_pid"; }
# replaced SIGNAL PROGRAM: the running agent gets the signal; some time later PROGRAM runs in its place.
replaced() {
    kill "-$1" "$agent_pid" && until_true 30 process_gone "$agent_pid" || return 1
    sleep 0.7
    local kept=$afterimage
    afterimage=$2
    start_agent "$loop_device"
    afterimage=$kept
    [ "$(readlink "/proc/$agent_pid/exe")" = "$(readlink -f "$2")" ]
}
goes_on() { # after TIME
    tail -c "+$((agent_log_bytes + 1))" "$run_dir/agent.log" | grep -q "followed while no agent ran" || { echo "it began anew"; return 1; }
    until_true 90 has_point_after s "$1" || { echo "no recovery point: $(server_field s state), $(server_field s reason)"; return 1; }
    [ "$(full_syncs s)" = "$syncs" ] && [ "$(server_field s agent.live.resyncCount)" = 0 ] || { echo "there was a full sync, or a resync"; return 1; }
}
exact() { end_load && exact_after "$(now)"; }

syncs=$(full_syncs s)
start_load || not_ok "the disk is written to" "nothing was"
replaced TERM "$second" || not_ok "ended, and another version is started" "it is not that one which runs"
check "ended under load, another version goes on, and nothing is copied again" goes_on "$(now)"
for version in "$first" "$second" "$first"; do
    replaced KILL "$version" || not_ok "killed, and another version is started" "it is not that one which runs"
    check "killed under load, another version goes on, and nothing is copied again" goes_on "$(now)"
done
check "every write of all that is in the next point" exact

# --- what is in the kernel is another version's ------------------------------------------------------------------------
pins=/sys/fs/bpf/afterimage-$(cat "$primary_state/tap-name")
another_abi() {
    python3 - "$pins/map-state" <<'PYTHON'
import ctypes, mmap, struct, sys
bpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
fd = bpf.bpf_obj_get(sys.argv[1].encode())
assert fd >= 0, "cannot open " + sys.argv[1]
with mmap.mmap(fd, 4096) as memory:
    abi, = struct.unpack_from("=I", memory, 8)  # clivetap_state.abi
    assert 0 < abi < 1000, abi
    struct.pack_into("=I", memory, 8, abi + 1)
PYTHON
}
start_load || not_ok "the disk is written to" "nothing was"
kill -TERM "$agent_pid"
until_true 30 process_gone "$agent_pid" || true
check "what is pinned is made another version's" another_abi
start_agent "$loop_device"
compared() {
    ! tail -c "+$((agent_log_bytes + 1))" "$run_dir/agent.log" | grep -q "followed while no agent ran" || { echo "it was taken over"; return 1; }
    [ "$(full_syncs s)" -gt "$syncs" ] || { echo "nothing was compared"; return 1; }
}
check "it is not taken over: a point comes when everything was compared" until_true 90 has_point_after s "$(now)"
check "and that is said" compared
same() { [ "$(server_field s agent.resyncEqualBytes)" -gt 0 ]; }
check "what was the same was not sent" same
check "every write is in the next point" exact
finish
