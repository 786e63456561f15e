#!/usr/bin/env bash
# alone
# limit: 480
# Short runs of order-check: every recovery point of dependent writes on two disks is crash-consistent, left in peace and with
# agent, appliance or both killed every few seconds.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"

[ "$(id -u)" = 0 ] || { skip order-check "it needs root, for loop devices"; finish; }
make_run_dir

# checked NAME ARG...
checked() {
    local name=$1 status=0 line
    shift
    foreground "$repository/tools/order-check" --tap nbd --disks 2 "$@" >"$run_dir/log" 2>&1 || status=$?
    line=$(tail -n 1 "$run_dir/log")
    if [ "$status" = 0 ] && [[ $line =~ ^([0-9]+)\ passed,\ 0\ failed ]] && [ "${BASH_REMATCH[1]}" -gt 0 ]; then
        ok "$name: $line"
    else
        not_ok "$name" "exit code $status: $(tail -n 6 "$run_dir/log" | tr '\n' ' ')"
    fi
}
checked "order-check" --seconds 15
checked "order-check with kills" --seconds 24 --kill 4 --epoch-ms 100
finish
