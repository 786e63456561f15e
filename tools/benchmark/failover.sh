#!/usr/bin/env bash
# failover.sh [--size MIB] [--disk BYTES] [--layers N]: the machine of the quickstart is protected, killed and failed over; seconds from the failover
# command until the recovered machine's own check has passed, as RESULT. FIGURE boot-s: of those, from QEMU's start on. FIGURE NAME-ms: until
# the task's log has the line of a step.
#   --size     of the machine's image (512)        --disk  of its disk, when that is larger: a sparse file (1T)
#   --layers   recovery points that the replica has before it, each a layer (1)
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch guest product; do source "$repository/tools/lib/$part.sh"; done

size=512 disk= layers=1
while [ $# -gt 0 ]; do
    case $1 in
    --size) size=$2 ;;
    --disk) disk=$2 ;;
    --layers) layers=$2 ;;
    *) die "unknown: $1" ;;
    esac
    shift 2
done
afterimage=$AFTERIMAGE
make_run_dir
fetch_qemu10
product_setup
"$repository/tools/make-machine" --size "$size" --output "$run_dir/disk.img"
[ -z "$disk" ] || truncate -s "$disk" "$run_dir/disk.img"
attach_loop "$run_dir/disk.img"
start_appliance
start_agent "$loop_device"
tap_disk "$tap_socket" vda
start_guest "$run_dir/console" "${tap_disk[@]}"
wait_console "$run_dir/console" 60 '^AFTERIMAGE-CHECK ok' "$guest_pid"
enrol s
# A sparse disk of a TiB is read once.
timeout 1800 "$afterimage" replication start s --cpus 1 --memory 256 --policy keep-all --epoch-ms 200 --wait </dev/null
recorded() { [ "$(last_acknowledged "$run_dir/console")" -ge 200 ]; }
until_true 60 recorded
until_true 300 point_count_is s "$layers"
kill_now "$guest_pid" "$agent_pid"
started=$(now)
timeout 120 "$afterimage" failover start s --yes s --network isolated --boot-check 'serial:AFTERIMAGE-CHECK ok' --wait --json </dev/null >"$run_dir/task.json"
echo "RESULT $(since "$started")"
"$afterimage" task show "$(json id <"$run_dir/task.json")" --json </dev/null | python3 -c '
import json, sys
from datetime import datetime
task = json.load(sys.stdin)
def moment(text): return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
accepted = moment(task["created"])
steps = {"fenced": "the source is fenced", "chosen": "recovery point rp", "qemu": "QEMU started", "ready": "boot check passed"}
at = {name: moment(line["time"]) for name, words in steps.items() for line in task["log"] if words in line["line"]}
for name in at: print("FIGURE %s-ms %d" % (name, 1000 * (at[name] - accepted)))
print("FIGURE boot-s %.3f" % (at["ready"] - at["qemu"]))'
"$afterimage" server show s --json </dev/null | python3 -c '
import json, sys
print("FIGURE layers %d" % json.load(sys.stdin)["layerCount"])'
