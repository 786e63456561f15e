#!/usr/bin/env bash
# plain-boot.sh [--size MIB] [--disk BYTES]: the same machine as failover.sh's, killed after as many records, booted by QEMU straight from its disk;
# seconds until its own check has passed.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch guest; do source "$repository/tools/lib/$part.sh"; done

size=512 disk=
while [ $# -gt 0 ]; do
    case $1 in
    --size) size=$2 ;;
    --disk) disk=$2 ;;
    *) die "unknown: $1" ;;
    esac
    shift 2
done
make_run_dir
fetch_qemu10
"$repository/tools/make-machine" --size "$size" --output "$run_dir/disk.img"
[ -z "$disk" ] || truncate -s "$disk" "$run_dir/disk.img"
attach_loop "$run_dir/disk.img"
boot() { start_guest "$run_dir/console" -drive "file=$loop_device,format=raw,if=virtio,cache=none,aio=io_uring"; }
recorded() { [ "$(last_acknowledged "$run_dir/console")" -ge 200 ]; }
boot
until_true 60 recorded
kill_now "$guest_pid"
started=$(now)
boot
wait_console "$run_dir/console" 60 '^AFTERIMAGE-CHECK ok' "$guest_pid"
echo "RESULT $(since "$started")"
