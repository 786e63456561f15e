#!/usr/bin/env bash
# limit: 300
# A recovery point written into a raw file, a qcow2 file and onto a device equals the disk; targets that must not be touched are not;
# an appliance killed in the middle of it leaves nothing half made under the final name.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product export
make_run_dir
out=$run_dir/out
mkdir "$out"
protect 96
# Holes and written zeroes: a sparse copy has neither.
dd if=/dev/zero of="$disk_file" bs=1M seek=30 count=20 conv=notrunc status=none
"$afterimage" replication start s --wait </dev/null >/dev/null
started=$(now)
until_true 60 has_point_after s "$started" || give_up "no recovery point" "$run_dir/appliance.log"
point=$(point_after s "$started")

export_command=("$afterimage" recovery-point export s "$point" --wait)
export_to() { "${export_command[@]}" "$@" </dev/null; }
same() { # FORMAT FILE
    qemu-img compare -f "$1" -F raw "$2" "$disk_file"
}
no_partials() { ! compgen -G "$out/*.afterimage-partial" >/dev/null; }

check "raw: the export succeeds" export_to --to raw --output "$out/a.raw"
check "raw: equals the disk" cmp "$out/a.raw" "$disk_file"
is_sparse() { [ "$(du -k "$out/a.raw" | cut -f1)" -le $((77 * 1024)) ] || { du -k "$out/a.raw"; return 1; }; }
check "raw: zeroes are holes" is_sparse
check "qcow2: the export succeeds" export_to --to qcow2 --output "$out/a.qcow2"
check "qcow2: equals the disk" same qcow2 "$out/a.qcow2"
refuses "an existing file is not overwritten" "already: nothing is overwritten" "${export_command[@]}" --to raw --output "$out/a.raw"
refuses "a relative path is refused" "from / on" "${export_command[@]}" --to raw --output a.raw
refuses "a place inside the store is refused" "inside the store" "${export_command[@]}" --to raw --output "$store/a.raw"

# --- a device --------------------------------------------------------------------------------------------------------
target() { # FILE MIB: sets $target_device
    truncate -s "$2M" "$1"
    target_device=$(losetup --find --show "$1")
    defer losetup -d "$target_device"
}
source_device=$loop_device
target "$run_dir/small.img" 64
refuses "device: too small" "too small" "${export_command[@]}" --to device --output "$target_device"
target "$run_dir/target.img" 100
head -c 100M /dev/urandom >"$run_dir/target.img"
sync
blockdev --flushbufs "$target_device"
refuses "device: not empty" "not empty" "${export_command[@]}" --to device --output "$target_device"
refuses "device: the wrong confirmation" "not empty" "${export_command[@]}" --to device --output "$target_device" --yes "$source_device"
refuses "device: in use" "holds it open|cannot open" "${export_command[@]}" --to device --output "$source_device" --yes "$source_device"
check "device: confirmed, the export succeeds" export_to --to device --output "$target_device" --yes "$target_device"
check "device: equals the disk" cmp -n "$((96 << 20))" "$target_device" "$disk_file"
rest_is_zero() { cmp -n "$((4 << 20))" -i "$((96 << 20)):0" "$target_device" /dev/zero; }
check "device: nothing old is left behind the disk's end" rest_is_zero
mkfs.ext4 -q -F "$target_device"
mkdir "$run_dir/mnt"
mount "$target_device" "$run_dir/mnt"
refuses "device: mounted" "mounted on" "${export_command[@]}" --to device --output "$target_device" --yes "$target_device"
umount "$run_dir/mnt"

# --- cut off ---------------------------------------------------------------------------------------------------------
# start_export FILE FORMAT: in the background; sets $task
start_export() { task=$("$afterimage" recovery-point export s "$point" --to "$2" --output "$1" --json </dev/null | json id); }
task_ended() { [ "$("$afterimage" task show "$task" --json </dev/null | json status)" != running ]; }
task_succeeded() { task_ended && [ "$("$afterimage" task show "$task" --json </dev/null | json status)" = succeeded ]; }
for round in 1 2 3 4; do
    format=$([ $((round % 2)) = 0 ] && echo qcow2 || echo raw)
    file=$out/killed-$round.$format
    start_export "$file" "$format"
    until_true 20 test -e "$file.afterimage-partial" -o -e "$file" || true
    sleep "0.0$((round * 2))"                                      # anywhere in it
    kill_now "$appliance_pid"
    start_appliance
    until_true 60 task_ended || true
    check "$format: killed appliance, round $round: the export ends by itself" task_succeeded
    check "$format: killed appliance, round $round: equals the disk" same "$format" "$file"
done
check "no partial file is left" no_partials

# Cancelled: slow enough to be caught, or done already; never a file that is not whole.
start_export "$out/cancelled.raw" raw
"$afterimage" task cancel "$task" </dev/null >/dev/null 2>&1 || true
until_true 20 task_ended || true
whole_or_absent() { [ ! -e "$out/cancelled.raw" ] || cmp "$out/cancelled.raw" "$disk_file"; }
check "cancelled: a whole file or none" whole_or_absent
check "cancelled: no partial file" no_partials
unprotect
finish
