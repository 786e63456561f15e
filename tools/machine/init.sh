#!/bin/busybox sh
# /init of the machine: checks the file system and the records of its data partition, says so on the console, records on.
# Settings, from the kernel's command line (recorder.rate=40) or QEMU's -smbios type=1,serial=recorder:rate=40:once
#   rate=N  records a second       bulk=N  KiB/s of bulk data (0: none)       once  check, then power off
/bin/busybox mkdir -p /proc /sys /dev /data /sbin /etc
/bin/busybox --install -s /bin
export PATH=/bin:/sbin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ln -s /proc/mounts /etc/mtab

rate=40 bulk=512 once=
for word in $(sed 's/recorder\.//g' /proc/cmdline) $(sed -n 's/^recorder://p' /sys/class/dmi/id/product_serial 2>/dev/null | tr : ' '); do
    case $word in
    rate=*) rate=${word#*=} ;;
    bulk=*) bulk=${word#*=} ;;
    once) once=1 ;;
    esac
done

end() { sync; poweroff -f; }
fail() { echo "AFTERIMAGE-CHECK FAILED $*"; end; }

modprobe virtio_blk 2>/dev/null
disk=
for try in $(seq 200); do
    disk=$(findfs LABEL=afterimage 2>/dev/null) && break
    [ "$try" != 20 ] || for module in ahci sd_mod virtio_scsi; do modprobe $module 2>/dev/null; done
    usleep 20000
done
[ -n "$disk" ] || fail "no disk with the data partition"

# Mounting replays the journal, as after any crash. Only then is a read-only fsck meaningful: it must find nothing.
mount -t ext4 -o noatime "$disk" /data || fail "cannot mount $disk: $(dmesg | grep EXT4-fs | tail -n 1)"
umount /data || fail "cannot unmount $disk after the journal was replayed"
e2fsck -fn "$disk" >/fsck.log 2>&1 || fail "file system: $(grep -v -e '^Pass' -e '^e2fsck' /fsck.log | head -n 2 | tr '\n' ' ')"
mount -t ext4 -o noatime "$disk" /data || fail "cannot mount $disk"
checked=$(recorder check /data) || { echo "$checked"; end; }
! dmesg | grep -q 'EXT4-fs error' || fail "file system: $(dmesg | grep 'EXT4-fs error' | head -n 1)"

boots=$(cat /data/boots 2>/dev/null || echo 0)
boots=$((boots + 1))
echo $boots >/data/boots.new && sync && mv /data/boots.new /data/boots && sync || fail "cannot write to the data partition"
echo "AFTERIMAGE-CHECK ok boots=$boots $checked fs=clean kernel=$(uname -r) uptime=$(cut -d' ' -f1 /proc/uptime)"
[ -z "$once" ] || { umount /data; end; }

recorder record /data "$rate" "$bulk"
echo "AFTERIMAGE-RECORDER ended with status $?"
end
