#!/usr/bin/env bash
# failback.sh MEBIBYTES CHANGED: seconds from Initiate Reverse Replication until the original disk, of that size and full, is what the recovery machine runs on. CHANGED MiB
# were written since the failover, half by the machine and half by the original, which the live tap followed all the time. FIGURE full-sync-s: the same disk's full sync, from Start
# Replication until its first recovery point is durable; compared-mib and sent-mib of the way back.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch product; do source "$repository/tools/lib/$part.sh"; done

mebibytes=$1 changed=$2
afterimage=$AFTERIMAGE
make_run_dir
keep_bpffs
fetch_qemu10
product_setup
agent_tap=live
openssl enc -aes-128-ctr -nosalt -K 00112233445566778899aabbccddeeff -iv 00 </dev/zero 2>/dev/null | head -c "${mebibytes}M" >"$run_dir/disk.img" || true
sync "$run_dir/disk.img"
attach_loop "$run_dir/disk.img"
ai() { "$afterimage" "$@" </dev/null; }
field() { server_field s "$1"; }
write() { # DEVICE|URI MEBIBYTES: 1 MiB in each of so many places, spread over the disk
    local step=$((mebibytes / $2)) number command=()
    for ((number = 0; number < $2; number++)); do command+=(-c "write -q -P $((RANDOM % 250 + 1)) $(((number * step + $3) % mebibytes))M 1M"); done
    qemu-io -f raw "${command[@]}" -c flush "$1"
}
start_appliance
start_agent "$loop_device"
enrol s
started=$(now)
timeout 600 "$afterimage" replication start s --policy all:1h --wait </dev/null >/dev/null
received=$(ai recovery-point list s --json | json 0.receivedTimeNanoseconds)
ai failover start s --memory 64 --wait --yes s >/dev/null
machine_disk="nbd+unix:///vda?socket=$(field instances.0.nbdSocketPath)"
until_true 60 grep -q "fenced: this server was failed over" "$run_dir/agent.log" || die "the source was not fenced"
write "$loop_device" $((changed / 2)) 3
write "$machine_disk" $((changed / 4)) 11
ai failover commit s --yes s >/dev/null
write "$machine_disk" $((changed / 4)) 17
kill_now "$agent_pid"
ai agent enroll --token "$(ai reverse register s --json | json token)" --state "$run_dir/rescue" >/dev/null
start "$run_dir/rescue.log" "$afterimage" agent rescue --state "$run_dir/rescue" --followed-by "$primary_state" --disk "vda=$loop_device"
until_true 60 server_state_is s "Reversed Initialized" || die "the original disk is not there: $(tail -n 3 "$run_dir/rescue.log")"
began=$(now)
timeout 600 "$afterimage" reverse start s --original-machine --confirm "$loop_device" --wait </dev/null >/dev/null
ended=$(now)
qemu-img compare -T none -f raw -F raw "$machine_disk" "$loop_device" >/dev/null || die "the original disk is not what the machine runs on"
awk -v s="$started" -v r="$received" -v b="$began" -v e="$ended" -v c="$(field reverse.comparedBytes)" -v n="$(field reverse.sentBytes)" 'BEGIN {
    printf "FIGURE full-sync-s %.3f\nFIGURE compared-mib %.1f\nFIGURE sent-mib %.1f\nRESULT %.3f\n", r / 1e9 - s, c / 2^20, n / 2^20, e - b }'
