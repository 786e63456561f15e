#!/usr/bin/env bash
# ten-machines.sh [COUNT]: as many servers with the tiny machine's disk are protected, their agents killed, and all are failed over at once; seconds until
# the last machine's own check has passed, as RESULT.
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh"
for part in packages fetch product; do source "$repository/tools/lib/$part.sh"; done

count=${1:-10}
afterimage=$AFTERIMAGE
make_run_dir
need_space $((count * 128 + 512))
fetch_qemu10
product_setup
"$repository/tools/make-machine" --size 96 --output "$run_dir/disk.img"
start_appliance
"$afterimage" site-pair create pair --type zone-to-zone --primary here --secondary there </dev/null >/dev/null
agents=()
for number in $(seq "$count"); do
    cp --sparse=always "$run_dir/disk.img" "$run_dir/disk-$number.img"
    attach_loop "$run_dir/disk-$number.img"
    primary_state=$run_dir/primary-$number sockets=$run_dir/t$number tap_socket=$run_dir/t$number/vda.sock
    mkdir -p "$primary_state" "$sockets"
    start_agent "$loop_device"
    agents+=("$agent_pid")
    token=$("$afterimage" server add "s$number" --pair pair --json </dev/null | json 0.token)
    "$afterimage" agent enroll --token "$token" --state "$primary_state" </dev/null >/dev/null
    until_true 30 server_state_is "s$number" Initialized
    timeout 120 "$afterimage" replication start "s$number" --cpus 1 --memory 256 --wait </dev/null >/dev/null
done
kill_now "${agents[@]}"
started=$(now)
waiting=()
for number in $(seq "$count"); do
    timeout 600 "$afterimage" failover start "s$number" --yes "s$number" --network isolated --boot-timeout 500 --boot-check 'serial:AFTERIMAGE-CHECK ok' --wait </dev/null >"$run_dir/failover-$number.log" 2>&1 &
    waiting+=($!)
done
for pid in "${waiting[@]}"; do wait "$pid" || { tail -n 5 "$run_dir"/failover-*.log >&2; die "a failover failed"; }; done
echo "RESULT $(since "$started")"
"$afterimage" server list --json </dev/null | python3 -c '
import json, sys
seconds = sorted(m["rtoSeconds"] for s in json.load(sys.stdin) for m in s["instances"])
print("FIGURE first-s %.2f" % seconds[0])
print("FIGURE median-s %.2f" % seconds[len(seconds) // 2])'
