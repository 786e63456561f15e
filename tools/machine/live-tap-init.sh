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
for module in virtio_pci virtio_blk virtio_scsi sd_mod nvme loop ext4 xfs; do modprobe $module 2>/dev/null; done

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
