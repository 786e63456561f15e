#!/usr/bin/env bash
# live-load.sh WHAT SECONDS: loads $BENCH_DEVICE with fio while the live tap does WHAT, and prints figures as "RESULT NUMBER" (the main one) and
# "FIGURE NAME NUMBER". WHAT:
#   idle DEPTH          not there
#   attached DEPTH      follows the disk; nothing is read
#   replicating DEPTH   replicates it; both sites are on this machine
#   greedy DEPTH        the same, with reads that take what they need (--read-share 100)
#   quiet               replicates a TiB that nobody writes to: percent of a core
#   points              replicates it under 2,000 random writes per second and a database that commits: how old the newest point was
#   freezes             the same, while one file-system-consistent point after the other is asked for: how long the freezes were
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch product; do source "$repository/tools/lib/$part.sh"; done

what=$1 seconds=$2 depth=${3:-32}
afterimage=$AFTERIMAGE agent_tap=live
make_run_dir
fetch_qemu10
product_setup

load() { # ARGUMENT...: sets $iops and $p99 (microseconds)
    read -r iops p99 < <(fio --name=bench --filename="$target" --rw=randwrite --bs=4k --ioengine=io_uring --direct=1 --runtime="$seconds" --time_based --ramp_time=1 \
        --norandommap --randrepeat=0 --output-format=json "$@" 2>/dev/null | python3 -c '
import json, sys
text = sys.stdin.read()
side = json.loads(text[text.index("{"):])["jobs"][0]["write"]
print(side["iops"], side["clat_ns"]["percentile"]["99.000000"] / 1000)')
}
cpu_ticks() { awk '{ sub(/^.*\) /, ""); print $12 + $13 }' "/proc/$1/stat"; }
replicate() {
    start_appliance
    start_agent "$@"
    enrol s
    timeout 600 "$afterimage" replication start s --policy all:1h --wait </dev/null >/dev/null
}

target=$BENCH_DEVICE
case $what in
idle) load --iodepth="$depth" ;;
attached)
    start_agent "$BENCH_DEVICE"
    load --iodepth="$depth" ;;
replicating | greedy)
    [[ $what == replicating ]] || agent_options=(--read-share 100)
    replicate "$BENCH_DEVICE"
    load --iodepth="$depth"
    "$afterimage" server show s --json </dev/null | python3 -c '
import json, sys
server = json.load(sys.stdin)
live = server["agent"]["live"]
print("FIGURE proven-percent %.1f" % (100 * live["provenCount"] / max(1, live["provenCount"] + live["unprovenCount"])))
print("FIGURE newest-point-age-s %.1f" % server["rpoSeconds"])
print("FIGURE gave-way %d" % live["gaveWayCount"])' ;;
quiet)
    truncate -s 1T "$run_dir/big.img"
    attach_loop "$run_dir/big.img"
    mkfs.xfs -q "$loop_device"
    mkdir "$run_dir/m"
    mount "$loop_device" "$run_dir/m"
    replicate "$loop_device"
    sleep 5
    began=$(now) before=$(cpu_ticks "$agent_pid")
    sleep "$seconds"
    after=$(cpu_ticks "$agent_pid") ended=$(now)
    umount "$run_dir/m"
    awk -v t="$((after - before))" -v a="$began" -v b="$ended" -v h="$(getconf CLK_TCK)" 'BEGIN { printf "RESULT %.3f\n", 100 * t / h / (b - a) }'
    awk '$1 == "VmHWM:" { printf "FIGURE agent-memory-mib %.0f\n", $2 / 1024 }' "/proc/$agent_pid/status"
    exit ;;
points | freezes)
    truncate -s 5G "$run_dir/big.img"
    attach_loop "$run_dir/big.img"
    mkfs.ext4 -q "$loop_device"
    mkdir "$run_dir/m"
    mount "$loop_device" "$run_dir/m"
    fallocate -l 4G "$run_dir/m/data"
    target=$run_dir/m/data
    replicate "$loop_device"
    start "$run_dir/commits" python3 "$repository/tools/lib/transactions.py" write "$run_dir/m/shop.db" 600
    database_pid=$started_pid
    [ "$what" = points ] || start "$run_dir/asked" bash -c 'while sleep 0.2; do "$0" recovery-point create s --consistency filesystem --wait </dev/null; done' "$afterimage"
    asking_pid=$started_pid
    began=$(now) before=$(cpu_ticks "$agent_pid")
    load --iodepth=8 --rate_iops=2000 --size=4G
    after=$(cpu_ticks "$agent_pid") ended=$(now)
    "$afterimage" recovery-point list s --json </dev/null >"$run_dir/points.json"
    "$afterimage" server show s --json </dev/null >"$run_dir/server.json"
    kill_now "$database_pid" "$asking_pid"
    umount "$run_dir/m"
    python3 - "$what" "$run_dir" "$began" "$ended" "$(awk -v t="$((after - before))" -v a="$began" -v b="$ended" -v h="$(getconf CLK_TCK)" 'BEGIN { print 100 * t / h / (b - a) }')" \
        "$(wc -l <"$run_dir/commits")" <<'PYTHON'
import json, sys
what, run, began, ended, cpu, commits = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
points = [p for p in json.load(open(run + "/points.json"))]
live = json.load(open(run + "/server.json"))["agent"]["live"]
# At any moment: the age of the newest durable point's cut.
arrivals = sorted((p["receivedTimeNanoseconds"] / 1e9, p["cutTimeNanoseconds"] / 1e9) for p in points)
ages, moment = [], began + 1
while moment < ended:
    known = [cut for received, cut in arrivals if received <= moment]
    ages.append(moment - max(known))
    moment += 0.01
ages.sort()
freezes = [p["proof"]["freezeMilliseconds"] for p in points if p.get("proof", {}).get("freezeMilliseconds")]
cuts = live["provenCount"] + live["unprovenCount"]
if what == "freezes":
    freezes.sort()
    print("RESULT %.1f" % freezes[len(freezes) // 2])
    print("FIGURE freezes %d" % len(freezes))
    print("FIGURE freeze-ms-p99 %.1f" % freezes[int(len(freezes) * 0.99)])
    print("FIGURE did-not-hold %d" % live["freezeFailedCount"])
    print("FIGURE point-age-s-p99 %.3f" % ages[int(len(ages) * 0.99)])
else:
    print("RESULT %.3f" % ages[int(len(ages) * 0.99)])
print("FIGURE median-age-s %.3f" % ages[len(ages) // 2])
print("FIGURE points-per-s %.2f" % (sum(began <= p["cutTimeNanoseconds"] / 1e9 <= ended for p in points) / (ended - began)))
print("FIGURE proven-percent %.2f" % (100 * live["provenCount"] / cuts))
print("FIGURE proven-without-freeze-percent %.2f" % (100 * (live["provenCount"] - len(freezes)) / cuts))
print("FIGURE freeze-ms-max %.1f" % live["freezeMillisecondsMax"])
print("FIGURE agent-cpu-percent %.2f" % cpu)
print("FIGURE commits-per-s %.0f" % (commits / (ended - began)))
PYTHON
    exit ;;
*) die "unknown: $what" ;;
esac
echo "RESULT $iops"
echo "FIGURE p99-us $p99"
