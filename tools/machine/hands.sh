#!/bin/sh
# The hands of the person at the machine: runs what comes over a virtio port, line by line, and answers with what it said and "HANDS-STATUS N".
# A machine without the port has nobody at it.
port=/dev/virtio-ports/hands
udevadm settle
[ -e $port ] || exit 0
exec 3<>$port
while read -r line <&3; do
    sh -c "$line" >/run/hands 2>&1 </dev/null
    status=$?
    { cat /run/hands; echo "HANDS-STATUS $status"; } >&3
done
