#!/usr/bin/env bash
# drill-beside.sh [SECONDS]: fio writes 1,000 random blocks a second into a protected disk, for so long without a drill and then for as long while drills of the server boot
# one after the other; both sites are on this machine. Writes a second beside the drills as RESULT; FIGURE before-iops, and how old the newest
# durable point was at 99 of 100 moments, before and beside.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch product; do source "$repository/tools/lib/$part.sh"; done

seconds=${1:-20}
afterimage=$AFTERIMAGE
make_run_dir
fetch_qemu10
product_setup
"$repository/tools/make-machine" --size 96 --output "$run_dir/disk.img"
attach_loop "$run_dir/disk.img"
boot_device=$loop_device
head -c 256M /dev/urandom >"$run_dir/data.img"
attach_loop "$run_dir/data.img"
start_appliance
start_agent "$boot_device" "$loop_device"
enrol s
timeout 120 "$afterimage" replication start s --cpus 1 --memory 256 --policy all:1h --wait </dev/null >/dev/null

load() { # NAME: writes down writes per second and when they began and ended
    local began
    began=$(now)
    fio --name=bench --rw=randwrite --bs=4k --ioengine=nbd --uri="nbd+unix:///vdb?socket=$sockets/vdb.sock" --size=256M --iodepth=4 --rate_iops=1000 \
        --runtime="$seconds" --time_based --norandommap --randrepeat=0 --output-format=json >"$run_dir/$1.fio" 2>/dev/null
    echo "$began $(now)" >"$run_dir/$1.times"
}
drills() {
    while [ ! -e "$run_dir/enough" ]; do
        "$afterimage" drill start s --network isolated --boot-check 'serial:AFTERIMAGE-CHECK ok' --wait </dev/null >/dev/null
        echo drill >>"$run_dir/drills"
        "$afterimage" drill clear s --wait </dev/null >/dev/null
    done
}
load before
drills >"$run_dir/drills.log" 2>&1 &
drills_pid=$!
load beside
touch "$run_dir/enough"
wait "$drills_pid" || die "a drill failed: $(tail -n 3 "$run_dir/drills.log")"
"$afterimage" recovery-point list s --json </dev/null >"$run_dir/points.json"
python3 - "$run_dir" <<'PYTHON'
import json, sys
run = sys.argv[1]
points = sorted((p["receivedTimeNanoseconds"] / 1e9, p["cutTimeNanoseconds"] / 1e9) for p in json.load(open(run + "/points.json")))
for name in ("before", "beside"):
    text = open(f"{run}/{name}.fio").read()
    side = json.loads(text[text.index("{"):])["jobs"][0]["write"]
    began, ended = map(float, open(f"{run}/{name}.times").read().split())
    ages, moment = [], began + 1
    while moment < ended:
        known = [cut for received, cut in points if received <= moment]
        if known: ages.append(moment - max(known))
        moment += 0.01
    ages.sort()
    print("RESULT %.1f" % side["iops"] if name == "beside" else "FIGURE before-iops %.1f" % side["iops"])
    print("FIGURE %s-p99-us %.0f" % (name, side["clat_ns"]["percentile"]["99.000000"] / 1000))
    print("FIGURE %s-point-age-s %.2f" % (name, ages[int(len(ages) * 0.99)]))
PYTHON
echo "FIGURE drills $(wc -l <"$run_dir/drills" 2>/dev/null || echo 0)"
