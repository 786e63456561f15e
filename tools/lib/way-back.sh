# The way back, after protected.sh: the machine's disk, the original, and what a recovery point holds.
ai() { "$afterimage" "$@" </dev/null; }
field() { server_field s "$1"; }
machine_socket() { field instances.0.nbdSocketPath; }
machine_uri() { echo "nbd+unix:///vda?socket=$(machine_socket)"; }
disk_is() { qemu-img compare -T none -f raw -F raw "$1" "$loop_device" 2>&1; }
disk_is_machine() { disk_is "$(machine_uri)"; }
point_is() { # POINT FILE
    local status=0
    qemu-img compare -T none -f raw -F raw "$(export_uri "$1")" "$2" 2>&1 || status=$?
    ai recovery-point unexport s --point "$1"
    return "$status"
}
follows() { [ "$(field reverse.phase)" = replicating ] && [ -n "$(field reverse.lastCutTime)" ]; }
