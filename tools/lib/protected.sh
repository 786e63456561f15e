# For tests without a guest: a loop device with random data, protected by appliance and agent, and written to through the tap.
source "$(dirname "${BASH_SOURCE[0]}")/product.sh"

# need_product: finds or builds the release, and QEMU for the appliance.
need_product() {
    [ "$(id -u)" = 0 ] || { skip "$1" "it needs root, for loop devices"; finish; }
    source "$repository/tools/lib/build.sh"
    afterimage=${AFTERIMAGE:-$build_dir/release/afterimage}
    [ -x "$afterimage" ] || { not_ok "$1" "there is no $afterimage: build it first (tools/test does)"; finish; }
    fetch_qemu10
}

# protect MIB: makes $disk_file and $loop_device with MIB of data, starts both sites and enrols server "s".
protect() {
    disk_file=$run_dir/disk.img
    head -c "${1}M" /dev/urandom >"$disk_file"
    attach_loop "$disk_file"
    product_setup
    start_appliance
    start_agent "$loop_device"
    enrol s
}

# unprotect: ends everything that protect and the test started, so that the next scenario starts from nothing.
unprotect() {
    stop_writer || true
    kill_now "$agent_pid" "$appliance_pid" || true
    losetup -d "$loop_device" || true
    rm -rf "$primary_state" "$secondary_state" "$sockets" "$disk_file" "$run_dir"/*.log
}

writer_pid=
start_writer() {
    start "$run_dir/writer.log" python3 "$repository/tools/lib/nbd.py" write "$tap_socket" vda --seed "$RANDOM"
    writer_pid=$started_pid
}
# stop_writer: sets $writer_said to its "writes=N interruptions=N".
stop_writer() {
    [ -n "$writer_pid" ] || return 0
    kill -TERM "$writer_pid" 2>/dev/null || true
    until_true 60 process_gone "$writer_pid" || { kill_now "$writer_pid"; return 1; }
    writer_pid=
    writer_said=$(tail -n 1 "$run_dir/writer.log")
}

export_uri() { # POINT: serves the point and prints its NBD URI
    "$afterimage" recovery-point export s --point "$1" --json </dev/null | json uris.0
}

# exact_after TIME: waits for a point cut after TIME, and compares it with the disk, byte by byte. Nobody may be writing.
exact_after() {
    until_true "${2:-90}" has_point_after s "$1" || { echo "no recovery point after that moment: $(server_field s state), $(server_field s reason)"; return 1; }
    local point uri status=0
    point=$(point_after s "$1")
    uri=$(export_uri "$point")
    qemu-img compare -T none -f raw -F raw "$uri" "$loop_device" 2>&1 || status=$?
    "$afterimage" recovery-point unexport s --point "$point" </dev/null
    return "$status"
}
