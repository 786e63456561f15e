#!/usr/bin/env bash
# limit: 240
# Other people's NBD programs against the tap and against a recovery point.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product interop
for program in nbdinfo nbdcopy qemu-img qemu-io; do
    command -v "$program" >/dev/null || { skip interop "$program is not installed"; finish; }
done
make_run_dir
size=64
protect "$size"
tap="nbd+unix:///vda?socket=$tap_socket"

says() { # PATTERN COMMAND...: COMMAND succeeds and prints something that matches
    local pattern=$1 output
    shift
    output=$("$@" 2>&1) || { echo "$output"; return 1; }
    grep -qE -- "$pattern" <<<"$output" || { echo "no /$pattern/ in: $output"; return 1; }
}
same_as_disk() { qemu-img compare -T none -f raw -F raw "$1" "$loop_device"; }
copies() { # URI: nbdcopy gives exactly the disk
    nbdcopy "$1" "$run_dir/copy" && cmp "$run_dir/copy" "$loop_device"
    rm -f "$run_dir/copy"
}
converts() {
    qemu-img convert -f raw -O qcow2 "$1" "$run_dir/copy.qcow2" && qemu-img compare -f qcow2 -F raw "$run_dir/copy.qcow2" "$loop_device"
    rm -f "$run_dir/copy.qcow2"
}

# everything URI WHAT READ_ONLY
everything() {
    check "$2: nbdinfo" says "export-size: $((size << 20))" nbdinfo "$1"
    check "$2: nbdinfo --list names the export" says "export=\"vda\"" nbdinfo --list "$1"
    check "$2: nbdinfo tells whether it is read-only" says "is_read_only: $3" nbdinfo "$1"
    check "$2: qemu-img info" says "$((size << 20)) bytes" qemu-img info "$1"
    check "$2: nbdcopy" copies "$1"
    check "$2: qemu-img convert" converts "$1"
    check "$2: qemu-img compare" same_as_disk "$1"
    check "$2: qemu-io reads" says "read 65536/65536" qemu-io -r -f raw -c "read 1M 64k" "$1"
}

everything "$tap" tap false
check "tap: qemu-io writes, zeroes, discards and flushes" says "pattern 0x5a|65536/65536" qemu-io -f raw \
    -c "write -P 0x5a 2M 64k" -c "read -P 0x5a 2M 64k" -c "write -f -P 0xa5 3M 4k" -c "write -z 4M 1M" -c "read -P 0 4M 1M" \
    -c "discard 8M 1M" -c "flush" "$tap"
check "tap: what qemu-io wrote is on the disk" same_as_disk "$tap"
check "tap: nbdcopy writes a whole disk" bash -c 'head -c "$1" /dev/urandom >"$2" && nbdcopy --flush "$2" "$3" && cmp "$2" "$4"' - $((size << 20)) "$run_dir/new" "$tap" "$loop_device"
rm -f "$run_dir/new"

"$afterimage" replication start s --wait </dev/null >/dev/null || not_ok "replication starts" "$(server_field s reason)"
written=$(now)
qemu-io -f raw -c "write -P 0x77 5M 256k" -c "write -z 16M 4M" -c flush "$tap" >/dev/null
written=$(now)
if until_true 60 has_point_after s "$written"; then
    point=$(point_after s "$written")
    uri=$(export_uri "$point")
    everything "$uri" "recovery point" true
    refuses "recovery point: a write is refused" "read-only|permission|not permitted|denied" qemu-io -f raw -c "write 0 4k" "$uri"
    "$afterimage" recovery-point unexport s --point "$point" </dev/null || not_ok "unexport" "failed"
    refuses "recovery point: gone when it is unexported" "connect|refused|no such file" nbdinfo "$uri"
else
    not_ok "a recovery point follows" "$(server_field s state), $(server_field s reason)"
fi
unprotect
finish
