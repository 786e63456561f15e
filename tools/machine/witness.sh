#!/bin/sh
# The workload of a machine with a whole Debian (tools/tests/guest-root-disk.sh). When the machine is up it checks what it recorded in its root file
# system before, says so on the console, and records on, while files come, change their names and go, and the journal is written to.
#   AFTERIMAGE-CHECK ok boots=N records=N last=N … root=rw errors=0 failed=none state=running kernel=… uptime=…
records=/var/lib/witness churn=/var/lib/witness-churn
mkdir -p "$records" "$churn"
state=$(systemctl is-system-running --wait)
failed=$(systemctl list-units --failed --plain --no-legend | cut -d' ' -f1 | paste -s -d,)
root=$(findmnt -n -o OPTIONS / | cut -d, -f1)
errors=$(cat "/sys/fs/ext4/$(basename "$(findmnt -n -o SOURCE /)")/errors_count")
echo # whatever else is on the console ends here
checked=$(recorder check "$records") || { echo "$checked"; exit 1; }
boots=$(($(cat "$records/boots" 2>/dev/null || echo 0) + 1))
echo $boots >"$records/boots.new" && sync "$records/boots.new" && mv "$records/boots.new" "$records/boots" || { echo "AFTERIMAGE-CHECK FAILED cannot write to the root file system"; exit 1; }
echo "AFTERIMAGE-CHECK ok boots=$boots $checked root=$root errors=$errors failed=${failed:-none} state=$state kernel=$(uname -r) uptime=$(cut -d' ' -f1 /proc/uptime)"

turn=0
while sleep 0.3; do
    turn=$((turn + 1))
    head -c 20000 /dev/urandom >"$churn/new"
    mv "$churn/new" "$churn/$((turn % 40))"
    ln -f "$churn/$((turn % 40))" "$churn/link"
    rm -f "$churn/$(((turn * 7 + 3) % 40))"
    logger -t witness "turn $turn"
done &
exec recorder record "$records" 20 256
