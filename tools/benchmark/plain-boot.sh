#!/usr/bin/env bash
# plain-boot.sh: the same machine, killed after as many records, booted by QEMU straight from its disk; seconds until its own
# check has passed.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch guest; do source "$repository/tools/lib/$part.sh"; done

make_run_dir
fetch_qemu10
"$repository/tools/make-machine" --output "$run_dir/disk.img"
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
