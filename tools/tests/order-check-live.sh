#!/usr/bin/env bash
# alone
# limit: 900
# order-check of the live tap: dependent writes on the raw disk and in mounted file systems, agent, appliance or both killed meanwhile, events hidden
# from the tap on purpose; every recovery point is crash-consistent, and the last one has every write. The two-minute form of the hour in docs/benchmarks.md.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"

[ "$(id -u)" = 0 ] || { skip order-check-live "it needs root, for loop devices"; finish; }
[ -e /sys/kernel/btf/vmlinux ] || { skip order-check-live "this kernel does not describe its types"; finish; }
make_run_dir

# checked NAME ARG...
checked() {
    local name=$1 status=0 line
    shift
    foreground "$repository/tools/order-check" --tap live --epoch-ms 100 --size 8 "$@" >"$run_dir/log" 2>&1 || status=$?
    line=$(tail -n 1 "$run_dir/log")
    if [ "$status" = 0 ] && [[ $line =~ ^([0-9]+)\ passed,\ 0\ failed ]] && [ "${BASH_REMATCH[1]}" -gt 0 ]; then
        ok "$name: $line"
    else
        not_ok "$name" "exit code $status: $(tail -n 6 "$run_dir/log" | tr '\n' ' ')"
    fi
}
checked "live tap, two disks, 32 chains, with kills" --fs none --disks 2 --chains 32 --kill 3 --seconds 120
checked "live tap, ext4 on two disks, with kills" --fs ext4 --disks 2 --kill 3 --seconds 20
checked "live tap, XFS, with kills" --fs xfs --disks 1 --kill 3 --seconds 20
checked "live tap, the kernel hides issues" --fs none --disks 2 --chains 8 --drop issues --seconds 15 --points-min 5
checked "live tap, the kernel hides completions" --fs ext4 --disks 1 --chains 8 --drop completions --kill 3 --seconds 20
finish
