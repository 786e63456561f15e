#!/bin/busybox sh
# stacked-load DEVICE ROUNDS [MEMBER]: makes an ext4 file system on a device that is stacked on others, and writes and removes files there, through the page cache and
# past it; what is freed is discarded. The MEMBER of a mirror is thrown out in the middle, and put back: it gets everything again.
export PATH=/bin:/sbin
/sbin/mke2fs -q -F -t ext4 "$1" && mkdir -p /stacked && mount -t ext4 -o discard "$1" /stacked || exit 1
for round in $(seq "$2"); do
    for file in $(seq 20); do dd if=/bin/busybox of=/stacked/$file bs=4k skip=$round count=$((file * 7 % 20 + 1)) conv=notrunc 2>/dev/null || exit 1; done
    sync
    dd if=/bin/busybox of=/stacked/direct bs=64k count=4 seek=$((round * 3)) oflag=direct conv=notrunc 2>/dev/null || exit 1
    for file in $(seq 1 3 20); do rm /stacked/$file; done
    [ -z "$3" ] || [ "$round" != $(($2 / 2)) ] || /sbin/mdadm --quiet "$1" --fail "$3" --remove "$3" || exit 1
    [ -z "$3" ] || [ "$round" != $(($2 / 2 + 2)) ] || /sbin/mdadm --quiet "$1" --add "$3" || exit 1
done
[ -z "$3" ] || /sbin/mdadm --wait "$1"
umount /stacked
