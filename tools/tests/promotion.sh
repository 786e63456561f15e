#!/usr/bin/env bash
# limit: 300
# A failed-over machine's disk leaves the product: as a raw file, a qcow2 file and on a device it equals what the machine has, with what was written after the failover;
# targets that must not be touched are not; an appliance killed in the middle of it leaves nothing half made. Its disks need no recovery point by then.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product promotion
make_run_dir
out=$run_dir/out
mkdir "$out"
protect 96
"$afterimage" replication start s --wait </dev/null >/dev/null
started=$(now)
until_true 60 has_point_after s "$started" || give_up "no recovery point" "$run_dir/appliance.log"
promote=("$afterimage" machine promote s --wait)
refuses "before a failover there is nothing to promote" "no failed-over machine" "${promote[@]}" --to raw --output "$out/early.raw"
refuses "before a failover there is nothing to hydrate" "no recovery machine" "$afterimage" machine hydrate s
"$afterimage" failover start s --yes s --wait </dev/null >/dev/null || give_up "the failover failed" "$run_dir/appliance.log"

# --- independent of recovery points ----------------------------------------------------------------------------------
hydration_ended() { [ "$(server_field s instances.0.hydration.isIndependent)" = True ]; }
check "after a failover the machine's disks become independent by themselves" until_true 60 hydration_ended
check "once more is done at once" "$afterimage" machine hydrate s --wait
says_so() { "$afterimage" server show s </dev/null | grep -q 'independent of recovery points'; }
check "server show says so" says_so

# --- while it runs ---------------------------------------------------------------------------------------------------
socket=$(server_field s instances.0.nbdSocketPath)
expected=$run_dir/expected.img
cp --sparse=never "$disk_file" "$expected"
write_both() { # PATTERN MIB
    qemu-io -f raw -c "write -P $1 ${2}M 1M" "nbd+unix:///vda?socket=$socket" >/dev/null && qemu-io -f raw -c "write -P $1 ${2}M 1M" "$expected" >/dev/null
}
write_both 7 5
promote_to() { "${promote[@]}" "$@" </dev/null; }
same() { qemu-img compare -f "$1" -F raw "$2" "$expected"; }
check "raw: the promotion succeeds" promote_to --to raw --output "$out/a.raw"
check "raw: equals the machine's disk" cmp "$out/a.raw" "$expected"
write_both 9 20
check "qcow2: the promotion succeeds" promote_to --to qcow2 --output "$out/a.qcow2"
check "qcow2: equals the machine's disk, with what was written meanwhile" same qcow2 "$out/a.qcow2"
refuses "an existing file is not overwritten" "already: nothing is overwritten" "${promote[@]}" --to raw --output "$out/a.raw"
refuses "a place inside the store is refused" "inside the store" "${promote[@]}" --to raw --output "$store/a.raw"
refuses "a disk that it does not have" "no disk vdz" "${promote[@]}" --to raw --output "$out/z.raw" --disk vdz

# --- a device --------------------------------------------------------------------------------------------------------
target() { # FILE MIB: sets $target_device
    truncate -s "$2M" "$1"
    target_device=$(losetup --find --show "$1")
    defer losetup -d "$target_device"
}
target "$run_dir/small.img" 64
refuses "device: too small" "too small" "${promote[@]}" --to device --output "$target_device"
target "$run_dir/target.img" 100
head -c 100M /dev/urandom >"$run_dir/target.img"
sync
blockdev --flushbufs "$target_device"
refuses "device: not empty" "not empty" "${promote[@]}" --to device --output "$target_device"
check "device: confirmed, the promotion succeeds" promote_to --to device --output "$target_device" --yes "$target_device"
check "device: equals the machine's disk" cmp -n "$((96 << 20))" "$target_device" "$expected"
mkfs.ext4 -q -F "$target_device"
mkdir "$run_dir/mnt"
mount "$target_device" "$run_dir/mnt"
refuses "device: mounted" "mounted on" "${promote[@]}" --to device --output "$target_device" --yes "$target_device"
umount "$run_dir/mnt"

# --- cut off ---------------------------------------------------------------------------------------------------------
start_promotion() { task=$("$afterimage" machine promote s --to "$2" --output "$1" --json </dev/null | json id); }
task_status() { "$afterimage" task show "$task" --json </dev/null | json status; }
task_ended() { [ "$(task_status)" != running ]; }
task_succeeded() { task_ended && [ "$(task_status)" = succeeded ]; }
no_partials() { ! compgen -G "$out/*.afterimage-partial" >/dev/null; }
for round in 1 2 3 4; do
    format=$([ $((round % 2)) = 0 ] && echo qcow2 || echo raw)
    file=$out/killed-$round.$format
    start_promotion "$file" "$format"
    until_true 20 test -e "$file.afterimage-partial" -o -e "$file" || true
    sleep "0.0$((round * 2))"                                      # anywhere in it
    kill_now "$appliance_pid"
    start_appliance
    until_true 60 task_ended || true
    check "$format: killed appliance, round $round: the promotion ends by itself" task_succeeded
    check "$format: killed appliance, round $round: equals the machine's disk" same "$format" "$file"
done
start_promotion "$out/cancelled.raw" raw
"$afterimage" task cancel "$task" </dev/null >/dev/null 2>&1 || true
until_true 20 task_ended || true
whole_or_absent() { [ ! -e "$out/cancelled.raw" ] || cmp "$out/cancelled.raw" "$expected"; }
check "cancelled: a whole file or none" whole_or_absent
check "no partial file is left" no_partials

# --- with its end ----------------------------------------------------------------------------------------------------
"$afterimage" failover commit s --yes s </dev/null >/dev/null
write_both 11 40
# Its firmware finds nothing to boot, and hears no power button.
check "stopped and promoted" promote_to --to raw --output "$out/last.raw" --stop --stop-timeout 1
check "it has all that the machine ever wrote" cmp "$out/last.raw" "$expected"
machine_is() { [ "$(server_field s instances.0.step)" = "$1" ]; }
check "the machine is stopped, and its disks are kept" machine_is stopped
check "it can be promoted again" promote_to --to qcow2 --output "$out/again.qcow2"
check "and is the same" same qcow2 "$out/again.qcow2"
check "it can be started again" "$afterimage" failover start-machine s --wait
check "the server and its machine are removed" "$afterimage" server remove s --yes s --stop-machine --delete-points --wait
unprotect
finish
