#!/usr/bin/env bash
# limit: 300
# Files out of a recovery point: ext4 and XFS, whole disks and partitions, clean and in use at the cut; and nothing is left mounted
# after an unmount, an end or a SIGKILL of the appliance.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

command -v nbdfuse >/dev/null || { skip file-restore "there is no nbdfuse (Debian: libnbd-bin)"; finish; }
[ -c /dev/fuse ] || { skip file-restore "there is no /dev/fuse"; finish; }
command -v mkfs.xfs >/dev/null || { skip "file-restore: XFS" "there is no mkfs.xfs (Debian: xfsprogs)"; }
need_product file-restore
make_run_dir

# Partition 1 (no file system), 2 (ext4), 3 (XFS, when there is mkfs.xfs), filled through loop devices of their own.
disk_file=$run_dir/disk.img
truncate -s 512M "$disk_file"
sfdisk -q "$disk_file" <<<$'label: gpt\nsize=4MiB, name=boot\nsize=64MiB, name=data\nsize=400MiB, name=big' >/dev/null
mkdir "$run_dir/fill" "$run_dir/m"
fill() { # START-MIB SIZE-MIB TYPE [dirty]
    local device
    device=$(losetup --find --show -o "$(($1 << 20))" --sizelimit "$(($2 << 20))" "$disk_file")
    "mkfs.$3" -q "$device"
    mount "$device" "$run_dir/fill"
    head -c 3M /dev/urandom >"$run_dir/fill/$3-file"
    echo "hello from $3" >"$run_dir/fill/greeting"
    cp "$run_dir/fill/$3-file" "$run_dir/$3-file"
    umount "$run_dir/fill"
    losetup -d "$device"
}
fill 5 64 ext4
! command -v mkfs.xfs >/dev/null || fill 69 400 xfs
attach_loop "$disk_file"
product_setup
start_appliance
start_agent "$loop_device"
enrol s
"$afterimage" replication start s --wait </dev/null >/dev/null
point=$(points s | tail -n 1 | cut -d' ' -f1)
"$afterimage" recovery-point hold s "$point" --name test </dev/null >/dev/null 2>&1 || true

mounted() { awk -v p="$run_dir/m" '$2 == p { found = 1 } END { exit !found }' /proc/mounts; }
nothing_left() {
    ! mounted || { echo "it is mounted"; return 1; }
    [ -z "$(losetup -n -l -O BACK-FILE | grep -F "$sockets/mount-")" ] || { losetup -l; return 1; }
    [ -z "$(ls -d "$sockets"/mount-* 2>/dev/null)" ] || { ls "$sockets"; return 1; }
    [ -z "$(mount_points_below "$sockets")" ] || { mount_points_below "$sockets"; return 1; }
}
mount_command=("$afterimage" recovery-point mount s "$point" "$run_dir/m")
mount_point() { "$afterimage" recovery-point mount s "$point" "$run_dir/m" "$@" </dev/null; }
unmount_point() { "$afterimage" recovery-point unmount "$run_dir/m" </dev/null; }
same_files() { grep -qx "hello from $1" "$run_dir/m/greeting" && cmp "$run_dir/m/$1-file" "$run_dir/$1-file"; }

check "ext4: mounts" mount_point --partition 2
check "ext4: the files are those of the disk" same_files ext4
refuses "it cannot be written to" "read-only" touch "$run_dir/m/new"
refuses "the directory is taken" "mounted on .* already" "${mount_command[@]}" --partition 2
exec 9<"$run_dir/m/greeting"
refuses "unmount is refused while a file is open" "is in use" "$afterimage" recovery-point unmount "$run_dir/m"
exec 9<&-
check "unmount" unmount_point
check "unmount leaves nothing" nothing_left
refuses "a partition without a file system" "no file system" "${mount_command[@]}" --partition 1
refuses "a partition that is not there" "no partition 9" "${mount_command[@]}" --partition 9
check "a refused mount leaves nothing" nothing_left
if command -v mkfs.xfs >/dev/null; then
    refuses "several file systems: one must be named" "--partition: .*2 \(ext4.*3 \(xfs" "${mount_command[@]}"
    check "XFS: mounts" mount_point --partition 3
    check "XFS: the files are those of the disk" same_files xfs
    check "XFS: unmount" unmount_point
fi

# The appliance ends, and is killed, while a point is mounted.
for signal in TERM KILL; do
    check "SIG$signal: mounts" mount_point --partition 2
    if [ "$signal" = TERM ]; then stop_process "$appliance_pid"; else kill_now "$appliance_pid"; fi
    start_appliance
    check "SIG$signal of the appliance: the next start leaves nothing" nothing_left
    said() { "$afterimage" event list </dev/null | grep -q "Unmount recovery point.*the appliance"; }
    check "SIG$signal of the appliance: the audit log says so" said
done

# In use at the cut: written through the tap by nobody, so made dirty by a copy of a mounted file system.
dirty_image() {
    local device copy=$run_dir/dirty.img
    truncate -s 64M "$copy"
    device=$(losetup --find --show "$copy")
    mkfs.ext4 -q "$device"
    mount "$device" "$run_dir/fill"
    echo "hello from ext4" >"$run_dir/fill/greeting"
    sync -f "$run_dir/fill"
    cp --sparse=always "$device" "$run_dir/snapshot.img" 2>/dev/null || dd if="$device" of="$run_dir/snapshot.img" bs=1M status=none
    umount "$run_dir/fill"
    losetup -d "$device"
}
dirty_image
qemu-img convert -n -f raw -O raw "$run_dir/snapshot.img" "json:{\"driver\":\"raw\",\"offset\":$((5 << 20)),\"size\":$((64 << 20)),\"file\":{\"driver\":\"nbd\",\"export\":\"vda\",\"server\":{\"type\":\"unix\",\"path\":\"$tap_socket\"}}}"
written=$(now)
until_true 60 has_point_after s "$written" || not_ok "a point of a file system in use" "none came"
point=$(point_after s "$written")
says_dirty() { mount_point --partition 2 | grep -q "was in use at the cut" && grep -q hello "$run_dir/m/greeting"; }
check "a file system in use at the cut mounts, and that is said" says_dirty
check "it unmounts" unmount_point
check "nothing is left" nothing_left
unprotect
finish
