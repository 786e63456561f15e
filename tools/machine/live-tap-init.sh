#!/bin/busybox sh
# /init of a guest that proves the live tap on its kernel (tools/lib/live-tap-guest.sh): does what /runs says, powers off.
/bin/busybox mkdir -p /proc /sys /dev /sbin /etc /mnt /tmp
/bin/busybox --install -s /bin
export PATH=/bin:/sbin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t bpf bpf /sys/fs/bpf
ln -s /proc/mounts /etc/mtab
for module in virtio_pci virtio_blk virtio_scsi sd_mod nvme loop ext4 xfs dm_mod raid1; do modprobe $module 2>/dev/null; done

# wait_for DEVICE...: until the kernel has found them; says which one it has not.
wait_for() {
    for device; do
        for try in $(seq 200); do
            [ ! -b "$device" ] || break
            usleep 50000
        done
        [ -b "$device" ] || { echo "the kernel has no $device"; return 1; }
    done
}

# namespace N: its disk. The kernel looks at them side by side and gives out names as it finds them.
namespace() {
    for disk in /sys/block/nvme*; do [ "$(cat "$disk/nsid")" != "$1" ] || echo "/dev/${disk##*/}"; done
}

# loops DISK MIB DEVICE...: DEVICEs with direct I/O, each on a file of MIB in the ext4 of DISK.
loops() {
    local disk=$1 size=$2 file
    shift 2
    wait_for "$disk" && mount -t ext4 "$disk" /mnt || return 1
    for device; do
        file=/mnt/${device##*/}
        dd if=/dev/zero of="$file" bs=1M count="$size" 2>/dev/null && sync && /sbin/losetup --direct-io=on "$device" "$file" || return 1
    done
}

# linear NAME DISK DISK: /dev/mapper/NAME, of four pieces of 8 MiB, of the disks in turn.
linear() {
    local piece=16384
    DM_DISABLE_UDEV=1 /sbin/dmsetup create "$1" <<TABLE
0 $piece linear $2 2048
$piece $piece linear $3 2048
$((piece * 2)) $piece linear $2 $((piece + 4096))
$((piece * 3)) $piece linear $3 $((piece + 4096))
TABLE
}

# raid1 MD DISK DISK: a mirror, as mdadm makes it.
raid1() { /sbin/mdadm --quiet --create "$1" --run --level=1 --raid-devices=2 "$2" "$3"; }

# null_disk QUEUES TAGS: /dev/nullb0, 32 MiB in memory.
null_disk() {
    modprobe null_blk nr_devices=0 && { mount -t configfs none /sys/kernel/config 2>/dev/null || true; } && mkdir /sys/kernel/config/nullb/nullb0 && (
        cd /sys/kernel/config/nullb/nullb0 && echo 32 >size && echo 1 >memory_backed && echo 1 >discard && echo "$1" >submit_queues && echo "$2" >hw_queue_depth && echo 1 >power
    )
    wait_for /dev/nullb0
}

# busy_scsi_disk: a disk of the kernel's own SCSI target, which says now and then that its host is busy. Sets $busy_scsi_disk.
busy_scsi_disk() {
    modprobe scsi_debug dev_size_mb=32 delay=0 lbpu=1 every_nth=40 opts=0x8000
    for try in $(seq 100); do
        for disk in /sys/block/sd*; do
            if grep -q scsi_debug "$disk/device/model" 2>/dev/null; then busy_scsi_disk=/dev/${disk##*/}; return; fi
        done
        usleep 50000
    done
    echo "the kernel has no disk of scsi_debug"
}

# As a kernel without BTF.
hide_btf() { mount -t tmpfs none /sys/kernel/btf; }

# run NAME ARGUMENT...: one check.
run() {
    local name=$1
    shift
    echo "LIVE-TAP-RUN $name"
    live-tap-holder check "$@" </dev/null 2>&1
    echo "LIVE-TAP-END $name status=$?"
}

echo "LIVE-TAP-KERNEL $(uname -r) btf=$([ -r /sys/kernel/btf/vmlinux ] && echo yes || echo no) uptime=$(cut -d' ' -f1 /proc/uptime)"
. /runs
echo "LIVE-TAP-DONE uptime=$(cut -d' ' -f1 /proc/uptime)"
poweroff -f
