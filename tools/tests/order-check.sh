#!/usr/bin/env bash
# limit: 180
# A short run of order-check: every recovery point of dependent writes on two disks is crash-consistent.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"

[ "$(id -u)" = 0 ] || { skip order-check "it needs root, for loop devices"; finish; }
make_run_dir
status=0
foreground "$repository/tools/order-check" --tap nbd --seconds 15 --disks 2 >"$run_dir/log" 2>&1 || status=$?
line=$(tail -n 1 "$run_dir/log")
if [ "$status" = 0 ] && [[ $line =~ ^([0-9]+)\ passed,\ 0\ failed ]] && [ "${BASH_REMATCH[1]}" -gt 0 ]; then
    ok "order-check: $line"
else
    not_ok "order-check" "exit code $status: $(tail -n 6 "$run_dir/log" | tr '\n' ' ')"
fi
finish
