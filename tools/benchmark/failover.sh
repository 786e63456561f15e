#!/usr/bin/env bash
# failover.sh: the machine of the quickstart is protected, killed and failed over; seconds from the failover command until the
# recovered machine's own check has passed.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch guest product; do source "$repository/tools/lib/$part.sh"; done

afterimage=$AFTERIMAGE
make_run_dir
fetch_qemu10
product_setup
"$repository/tools/make-machine" --output "$run_dir/disk.img"
attach_loop "$run_dir/disk.img"
start_appliance
start_agent "$loop_device"
tap_disk "$tap_socket" vda
start_guest "$run_dir/console" "${tap_disk[@]}"
wait_console "$run_dir/console" 60 '^AFTERIMAGE-CHECK ok' "$guest_pid"
enrol s
timeout 120 "$afterimage" replication start s --cpus 1 --memory 256 --wait </dev/null
recorded() { [ "$(last_acknowledged "$run_dir/console")" -ge 200 ]; }
until_true 60 recorded
kill_now "$guest_pid" "$agent_pid"
started=$(now)
timeout 120 "$afterimage" failover start s --yes s --network isolated --boot-check 'serial:AFTERIMAGE-CHECK ok' --wait </dev/null
echo "RESULT $(since "$started")"
