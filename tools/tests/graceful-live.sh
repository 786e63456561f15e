#!/usr/bin/env bash
# alone
# limit: 420
# A graceful failover of a host whose disks are followed by the live tap, while a database commits on a mounted file system: its file systems are frozen, and the
# last recovery point has every transaction that was ever committed. Whatever goes wrong on the way is rolled back, and the database commits on; whoever writes
# past the file systems is noticed.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product graceful-live
[ -e /sys/kernel/btf/vmlinux ] || { skip graceful-live "this kernel does not describe its types"; finish; }
make_run_dir
keep_bpffs
agent_tap=live
ai() { "$afterimage" "$@" </dev/null; }

# One disk with a file system, and one that a program has to itself.
mounted=$run_dir/mounted commits=$run_dir/commits
truncate -s 96M "$run_dir/disk.img" "$run_dir/raw.img"
attach_loop "$run_dir/raw.img"
raw=$loop_device
attach_loop "$run_dir/disk.img"
mkfs.ext4 -q "$loop_device"
mkdir "$mounted"
mount "$loop_device" "$mounted"
thaw() { fsfreeze --unfreeze "$mounted" 2>/dev/null || true; }
defer umount "$mounted"
defer thaw
product_setup
start_appliance
start_agent "$loop_device" "$raw"
enrol s

start "$commits" python3 "$repository/tools/lib/transactions.py" write "$mounted/shop.db" 3600 0.02
writer_pid=$started_pid
defer thaw
committed() { wc -l <"$commits"; }
commits_more() { local before; before=$(committed); until_true 20 committed_after "$before"; }
committed_after() { [ "$(committed)" -gt "$1" ]; }
# It stands: a second without a commit, soon after the log has said that it will.
commits_no_more() { until_true 5 stands_still; }
stands_still() { local before; before=$(committed); sleep 1; [ "$(committed)" = "$before" ]; }
agent_said() { grep -c -- "$1" "$run_dir/agent.log"; }
held() { [ "$(agent_said "writes are held: ")" -gt "$1" ]; }
task_failed_with() { ai task list --server s --limit 1 --json | json 0.error | grep -qE -- "$1"; }
rolled_back() { until_true 60 task_failed_with "$1" && until_true 90 server_state_is s Replicating && commits_more; }
throttled() {
    ai replication stop s >/dev/null 2>&1 || true # not at first
    ai replication start s --throttle "$1" --epoch-ms 300 --policy all:1h --wait >/dev/null
    until_true 90 server_state_is s Replicating
}
# begin_slowly: a graceful failover whose last recovery point takes seconds
begin_slowly() {
    local holds
    holds=$(agent_said "writes are held: " || true)
    # Not by this shell: a file system that is frozen by mistake would never let it go.
    start "$run_dir/ballast.log" dd if=/dev/urandom "of=$mounted/ballast" bs=1M count=8
    until_true 20 process_gone "$started_pid" || return 1
    ai failover start s --graceful --memory 64 --yes s >/dev/null
    until_true 30 held "$holds"
}

check "Replicating" throttled 0
check "the database commits" commits_more
previewed() { local words; words=$(ai failover start s --graceful --preview) && grep -q "file systems on the source's disks are frozen" <<<"$words" || { echo "$words"; return 1; }; }
check "it is said beforehand that the file systems stay frozen" previewed

# --- what cannot be held is noticed ------------------------------------------------------------------------------------
cat >"$run_dir/past.py" <<'PAST'
import mmap, os, sys, time
device, page = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT), mmap.mmap(-1, 4096)
while True:
    page[:8] = time.time_ns().to_bytes(8, "little")
    os.pwrite(device, page, 4096)
    print("written", flush=True)
    time.sleep(0.002)
PAST
# writes_past: begins to, until $past_pid is ended
writes_past() {
    rm -f "$run_dir/past.log"
    start "$run_dir/past.log" python3 "$run_dir/past.py" "$raw"
    past_pid=$started_pid
    until_true 20 grep -q written "$run_dir/past.log" && alive "$past_pid"
}
writes_past || not_ok "a program writes to a device past the file systems" "$(tail -n 2 "$run_dir/past.log")"
ai failover start s --graceful --memory 64 --yes s --wait >/dev/null 2>&1 || true
check "a program writes to a device past the file systems: a planned move is rolled back, with the disk's name" rolled_back "vdb was written to past the file systems"
kill_now "$past_pid"

# --- what goes wrong is rolled back --------------------------------------------------------------------------------------
check "the last point takes a while" throttled 1MiB
check "begun" begin_slowly
check "the database stands" commits_no_more
kill_now "$agent_pid"
check "the agent is killed: the file systems thaw at once" commits_more
start_agent "$loop_device" "$raw"
check "and it is rolled back" rolled_back "let go|not connected|did not happen"

check "begun again" begin_slowly
check "the database stands" commits_no_more
kill -STOP "$appliance_pid"
check "the appliance is silent: the agent lets go by itself" until_true 60 grep -q "has not repeated it" "$run_dir/agent.log"
check "and the database commits" commits_more
kill -CONT "$appliance_pid"
check "the appliance is back: rolled back, not failed over without these" rolled_back "."

check "and again" begin_slowly
check "the database stands" commits_no_more
kill -STOP "$agent_pid"
check "an agent that hangs: the file systems thaw by themselves" until_true 60 commits_more
kill -CONT "$agent_pid"
check "and it is rolled back" rolled_back "."

# Held for good by then: the appliance has to say that it is not.
kill_now "$appliance_pid"
printf '#!/bin/sh\n[ "$*" = --version ] && echo "QEMU emulator version 10.0.0"\n' >"$run_dir/qemu"
chmod +x "$run_dir/qemu"
qemu=$AFTERIMAGE_QEMU AFTERIMAGE_QEMU=$run_dir/qemu
start_appliance
AFTERIMAGE_QEMU=$qemu
check "replication goes on" throttled 0
until_true 90 server_state_is s Replicating
fences=$(agent_said "stay frozen" || true)
ai failover start s --graceful --memory 64 --yes s --wait >"$run_dir/failover.log" 2>&1 || true
fenced_once_more() { [ "$(agent_said "stay frozen")" -gt "$fences" ] || { tail -n 5 "$run_dir/failover.log"; return 1; }; }
check "the source was fenced and held for good, and no machine can be started there" fenced_once_more
check "the database commits again" until_true 60 commits_more
check "and it is rolled back" rolled_back "."
kill_now "$appliance_pid"
start_appliance

# --- done ------------------------------------------------------------------------------------------------------------------
check "replication goes on" throttled 0
check "the database commits" commits_more
check "the graceful failover" ai failover start s --graceful --memory 64 --wait --yes s
check "the server is failed over" server_state_is s "Failed Over"
check "nothing is committed at the source any more" commits_no_more
last=$(committed)
point=$(server_field s instances.0.recoveryPoint)
has_all() {
    local copy=$run_dir/copy device status=0
    ai recovery-point export s "$point" --disk vda --to raw --output "$run_dir/copy.img" --wait >/dev/null || return 1
    mkdir -p "$copy"
    device=$(losetup --find --show "$run_dir/copy.img")
    # As it was left: a frozen file system needs no journal.
    e2fsck -fn "$device" || status=1
    mount "$device" "$copy" && python3 "$repository/tools/lib/transactions.py" check "$copy/shop.db" "$last" || status=1
    umount "$copy"
    losetup -d "$device"
    return "$status"
}
say "$last transactions were committed at the source"
check "the machine's recovery point has every transaction that was ever committed, and a clean file system" has_all
writes_past || not_ok "something is written past the frozen file systems" "$(tail -n 2 "$run_dir/past.log")"
fences=$(agent_said "stay frozen")
kill_now "$appliance_pid" "$past_pid"
start_appliance
until_true 60 fenced_once_more
check "the source stands when the appliance comes back and fences it again, whatever was written past it" commits_no_more
kill -TERM "$agent_pid"
check "an agent that is stopped ends, and the source stands" until_true 20 process_gone "$agent_pid"
sleep 1
check "for good" commits_no_more
thaw
check "an operator lets the file systems go by hand: what waited is done, on disks that are followed no more" commits_more
kill_now "$writer_pid"
finish
