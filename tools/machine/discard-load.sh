#!/bin/busybox sh
# discard-load DISK ROUNDS: makes and removes files of the XFS on DISK, mounted so that it discards what is freed: the extents of one
# transaction become one request of many ranges. In each round every other file goes, so that they do not lie side by side.
export PATH=/bin:/sbin
mkdir -p /xfs && mount -t xfs -o discard "$1" /xfs || exit 1
for round in $(seq "$2"); do
    for file in $(seq 40); do dd if=/bin/busybox of=/xfs/$file bs=4k count=$((file % 5 + 1)) conv=notrunc 2>/dev/null || exit 1; done
    sync
    for file in $(seq 1 2 40); do echo /xfs/$file; done | xargs rm -f
    sync
done
umount /xfs
