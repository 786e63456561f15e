#!/usr/bin/env bash
# full-sync.sh DISK_FILE: seconds from Start Replication of that disk until its first recovery point is durable at the appliance.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch product; do source "$repository/tools/lib/$part.sh"; done

afterimage=$AFTERIMAGE
make_run_dir
fetch_qemu10
product_setup
ln "$1" "$run_dir/disk.img" # the same file under a name of this run's
attach_loop "$run_dir/disk.img"
start_appliance
start_agent "$loop_device"
enrol s
started=$(now)
timeout 250 "$afterimage" replication start s --wait </dev/null || { echo "not synced: $(server_field s state), $(server_field s reason)"; exit 1; }
received=$("$afterimage" recovery-point list s --json </dev/null | json 0.receivedTimeNanoseconds)
awk -v s="$started" -v r="$received" 'BEGIN { printf "RESULT %.3f\n", r / 1e9 - s }'
