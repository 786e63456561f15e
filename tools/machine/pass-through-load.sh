#!/bin/busybox sh
# pass-through-load DISK: writes to a SCSI disk past the block layer, three times, a while apart.
export PATH=/bin:/sbin LD_LIBRARY_PATH=/lib
for place in 10 20 30; do
    dd if=/dev/urandom of=/tmp/block bs=4k count=1 2>/dev/null
    sg_raw -s 4096 -i /tmp/block "$1" 2a 00 00 00 $place 00 00 00 08 00 2>/tmp/said || { cat /tmp/said; exit 1; } # WRITE (10)
    sleep 3
done
