#!/usr/bin/env bash
# limit: 300
# Recovery points that are more than crash-consistent, of a mounted file system that is written all the time: frozen for a moment, with the application's scripts
# around it, by the clock. What could not be had is said, and whatever happens to scripts and agent the host writes on.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product consistent-points
[ -e /sys/kernel/btf/vmlinux ] || { skip consistent-points "the live tap needs a kernel with BTF"; finish; }
make_run_dir
keep_bpffs
agent_tap=live
ai() { "$afterimage" "$@" </dev/null; }

# --- the host: an application that is quiet when it is asked to be -----------------------------------------------------
mounted=$run_dir/mounted commits=$run_dir/commits scripts=$run_dir/scripts.log script_seconds=4
cat >"$run_dir/application.py" <<'APPLICATION'
"""application.py run DIR: number after number into two files that are never synced, first a, then b, and into a journal that always is; prints "NUMBER TIME" then. While
DIR/quiesce is there it is between two numbers, and says so: DIR/quiesced. application.py check DIR COMMITS CUT: what had been printed before the cut is in DIR, unsynced or not.
application.py quiet DIR: that it was between two numbers, and had said so."""
import os
import sys
import time

slots, slot_bytes = 64, 4096


def content(number): return (b"%d " % number * slot_bytes)[:slot_bytes]


def run(root):
    a, b, journal = (os.open(f"{root}/{name}", os.O_RDWR | os.O_CREAT) for name in ("a", "b", "journal"))
    number = 0
    while True:
        if os.path.exists(root + "/quiesce"):
            with open(root + "/quiesced", "w") as file:
                file.write(str(number))
            while os.path.exists(root + "/quiesce"):
                time.sleep(0.01)
            os.unlink(root + "/quiesced")
        number += 1
        os.pwrite(a, content(number), number % slots * slot_bytes)
        time.sleep(0.01)
        os.pwrite(b, content(number), number % slots * slot_bytes)
        os.write(journal, b"%d\n" % number)
        os.fsync(journal)
        print(number, f"{time.time():.6f}", flush=True)
        time.sleep(0.01)


def numbers(path):
    found = {}
    with open(path, "rb") as file:
        while block := file.read(slot_bytes):
            number = int(block.split()[0].strip(b"\0") or 0)
            if number:
                if block != content(number):
                    sys.exit(f"{path}: the block of {number} is not whole")
                found[number % slots] = number
    return found


def check(root, commits, cut):
    before = [int(line.split()[0]) for line in open(commits) if line.endswith("\n") and float(line.split()[1]) < cut]
    last = before[-1]
    for name in "ab":
        found = numbers(f"{root}/{name}")
        for number in before[-slots:]:
            if found.get(number % slots, 0) < number:
                sys.exit(f"{name} has {found.get(number % slots)} where {number} was written before the cut")
    journal = open(root + "/journal").read().split()
    if int(journal[-1]) < last:
        sys.exit(f"the journal ends at {journal[-1]}, {last} was written before the cut")


def quiet(root):
    ends = open(root + "/a", "rb").read() == open(root + "/b", "rb").read(), open(root + "/journal").read().split()[-1], open(root + "/quiesced").read()
    if not ends[0] or ends[1] != ends[2]:
        sys.exit(f"not between two numbers: a and b the same: {ends[0]}, journal {ends[1]}, said to be quiet after {ends[2]}")


match sys.argv[1:]:
    case ["run", root]: run(root)
    case ["check", root, commits, cut]: check(root, commits, float(cut))
    case ["quiet", root]: quiet(root)
APPLICATION
# A guard of the agent's freeze is a process of its own, there as long as the freeze: the agent is killed inside it.
cat >"$run_dir/kill-inside.py" <<'KILL'
import os, sys, time
agent, pause = int(sys.argv[1]), float(sys.argv[2])
command = open(f"/proc/{agent}/cmdline").read()
seen, end = set(os.listdir("/proc")), time.time() + 20
while time.time() < end:
    for name in set(os.listdir("/proc")) - seen:
        seen.add(name)
        try:
            parent = int(open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1])
            if parent == agent and open(f"/proc/{name}/cmdline").read() == command:
                time.sleep(pause)
                if os.path.exists(f"/proc/{name}"):
                    os.kill(agent, 9)
                    sys.exit()
        except (OSError, ValueError):
            pass
    time.sleep(0.0005)
sys.exit("the agent froze nothing")
KILL
# The scripts write down that they ran; what they do next is up to $run_dir/mode.
for phase in pre post; do
    {
        printf '#!/bin/sh\nrun=%q mounted=%q\n' "$run_dir" "$mounted"
        cat <<'SCRIPT'
echo "$AFTERIMAGE_PHASE $(cat "$run/mode") $(date +%s.%N)" >>"$run/scripts.log"
case "$AFTERIMAGE_PHASE $(cat "$run/mode")" in
"pre fails") exit 3 ;;
"pre "*)
    touch "$mounted/quiesce"
    until [ -e "$mounted/quiesced" ]; do sleep 0.02; done
    [ "$(cat "$run/mode")" = works ] || tail -f "$run/mode" ;;
post*) rm -f "$mounted/quiesce" ;;
esac
SCRIPT
    } >"$run_dir/$phase-script"
    chmod +x "$run_dir/$phase-script"
done
mode() { echo "$1" >"$run_dir/mode"; }
mode works
: >"$scripts"

truncate -s 64M "$run_dir/disk.img"
attach_loop "$run_dir/disk.img"
mkfs.ext4 -q "$loop_device"
mkdir "$mounted"
mount "$loop_device" "$mounted"
thaw() { fsfreeze --unfreeze "$mounted" 2>/dev/null || true; }
defer umount "$mounted"
defer thaw
product_setup
start_appliance
agent_options=(--pre-script "$run_dir/pre-script" --post-script "$run_dir/post-script" --script-seconds "$script_seconds")
start_agent "$loop_device"
enrol s
start "$commits" python3 "$run_dir/application.py" run "$mounted"
defer thaw

committed_after() { [ "$(wc -l <"$commits")" -gt "$1" ]; }
# Somebody else's write and its own.
writes_on() { timeout 30 touch "$mounted/touched" && until_true 20 committed_after "$(wc -l <"$commits")"; }
agent_said() { grep -c -- "$1" "$run_dir/agent.log" || true; }
said_once_more() { [ "$(agent_said "$1")" -gt "$2" ]; }
replicating() { until_true 60 server_state_is s Replicating; }
task_is() { [ "$(ai task list --server s --limit 1 --json | json 0.status)" = "$1" ]; }

# --- questions about points --------------------------------------------------------------------------------------------
# point_list: a line per point, oldest first: ID CUT CONSISTENCY METHOD ROUNDS COLLISIONS FREEZE-MS ON-DEMAND; - for a proof that is not there yet.
point_list() {
    ai recovery-point list s --json | python3 -c '
import json, sys
for p in json.load(sys.stdin):
    proof = p.get("proof") or {}
    figures = [proof.get(k, "-") for k in ("method", "roundCount", "collisionCount", "freezeMilliseconds")]
    print(p["id"], "%d.%09d" % divmod(p["cutTimeNanoseconds"], 10**9), p["consistency"], *figures, p["isOnDemand"])'
}
# asked CONSISTENCY: asks for a point, waits for it; $point and $cut
asked() {
    local answer
    answer=$(ai recovery-point create s --consistency "$1" --wait --json) || { echo "$answer"; return 1; }
    point=$(json result.recoveryPoint <<<"$answer")
    [ -n "$point" ] || { echo "no point: $answer"; return 1; }
    cut=$(point_list | awk -v p="$point" '$1 == p { print $2 }')
}
ask() { asked "$1" >"$run_dir/ask.log" 2>&1 && ok "$2" || not_ok "$2" "$(tail -n 3 "$run_dir/ask.log" | tr '\n' ' ')"; }
# proven_by POINT CONSISTENCY METHOD: and by a freeze of more than nothing, if it is one.
proven_by() {
    point_list | awk -v p="$1" -v c="$2" -v m="$3" '$1 == p && $3 == c && $4 == m && $5 >= 1 && $6 >= 0 && (m == "freeze") == ($7 > 0) { found = 1 } END { exit !found }' \
        || { point_list | grep "^$1 "; return 1; }
}
# Its proof comes with the agent's next status.
is_proven_by() { until_true 20 proven_by "$@"; }
count_after() { point_list | awk -v t="$1" -v c="$2" '$2 + 0 > t + 0 && $3 == c { n++ } END { print n + 0 }'; }
some_after() { [ "$(count_after "$1" "$2")" -ge "${3:-1}" ]; }

# opened POINT COMMAND...: its copy, as it is: no journal is replayed, and none need be; mounted on $copy while COMMAND runs.
copy=$run_dir/copy
mkdir "$copy"
opened() {
    local status=0 device
    ai recovery-point export s "$1" --to raw --output "$run_dir/copy.img" --wait >/dev/null || return 1
    shift
    device=$(losetup --find --show --read-only "$run_dir/copy.img")
    ! dumpe2fs -h "$device" 2>/dev/null | grep needs_recovery || status=1
    e2fsck -fn "$device" || status=1
    mount -o ro,noload "$device" "$copy" || status=1
    if [ "$status" = 0 ]; then
        "$@" || status=1
        umount "$copy" || status=1
    fi
    losetup -d "$device"
    rm -f "$run_dir/copy.img"
    return "$status"
}
has_all() { python3 "$run_dir/application.py" check "$copy" "$commits" "$cut"; }
has_unsynced() { cmp "$copy/unsynced" "$mounted/unsynced" && has_all; }
was_quiet() { has_all && python3 "$run_dir/application.py" quiet "$copy"; }

replication() { # OPTION...
    ai replication stop s >/dev/null 2>&1 || true # not at first
    ai replication start s --policy all:1h "$@" --wait >/dev/null && replicating
}

# --- file-system-consistent --------------------------------------------------------------------------------------------
check "Replicating" replication
check "the application writes" writes_on
head -c 3M /dev/urandom >"$mounted/unsynced" # in memory; nobody asks for more
ask filesystem "a file-system-consistent point"
check "it is file-system-consistent, proven by a freeze" is_proven_by "$point" filesystem freeze
in_words() { ai recovery-point list s | grep "^$point " | grep -E "filesystem +freeze of [0-9]+ ms, [0-9]+ round.*on demand" || { ai recovery-point list s | grep "^$point "; return 1; }; }
check "and the list says so to people" in_words
check "what had been written before is in it, synced or not, and needs no journal" opened "$point" has_unsynced
check "the host writes on" writes_on
check "points from the clock are crash-consistent" until_true 30 some_after "$cut" crash

# --- application-consistent --------------------------------------------------------------------------------------------
runs() { cut -d' ' -f1,2 "$scripts" | tr '\n' ',' ; }
check "no script was run for them" [ ! -s "$scripts" ]
ask application "an application-consistent point"
check "it is application-consistent, proven by a freeze" is_proven_by "$point" application freeze
check "the application was quiet in it, and had said so" opened "$point" was_quiet
check "it is quiet no longer, and the host writes on" writes_on
for _ in 1 2 3; do asked application >"$run_dir/ask.log" 2>&1 || not_ok "more of them" "$(tail -n 3 "$run_dir/ask.log" | tr '\n' ' ')"; done
# Each one's scripts are around its cut, and there are no others.
around() {
    point_list | awk '$3 == "application" { print $2 }' >"$run_dir/cuts"
    python3 - "$scripts" "$run_dir/cuts" <<'AROUND'
import sys
runs = [line.split() for line in open(sys.argv[1])]
cuts = [float(line) for line in open(sys.argv[2])]
told = f"{len(cuts)} points, scripts: " + ", ".join(run[0] for run in runs)
if len(cuts) < 4 or [run[0] for run in runs] != ["pre", "post"] * len(cuts):
    sys.exit(told)
for index, cut in enumerate(cuts):
    if not float(runs[2 * index][2]) < cut < float(runs[2 * index + 1][2]):
        sys.exit(f"cut {cut} is not between {runs[2 * index]} and {runs[2 * index + 1]}")
AROUND
}
check "each has one pre-script before its cut and one post-script after it" around
asked_for() { [ "$(count_after 0 application)" = 4 ] || { echo "$(count_after 0 application) points, 4 were asked for"; return 1; }; }
check "and there are as many as were asked for" asked_for

# --- scripts that do not work ------------------------------------------------------------------------------------------
: >"$scripts"
mode fails
begin=$(now)
refuses "a pre-script that fails: no point is called application-consistent" "none of them application-consistent.*log says why" \
    "$afterimage" recovery-point create s --consistency application --wait
check "the points were made, and are file-system-consistent" some_after "$begin" filesystem
check "the agent's log says why" said_once_more "pre-script $run_dir/pre-script failed: " 0
paired() { [ "$(runs)" = "$(printf 'pre %s,post %s,' $(for _ in $(seq $(($(wc -l <"$scripts") / 2))); do echo "$1 $1"; done))" ] || { runs; return 1; }; }
check "the post-script ran after each" paired fails
check "and the host writes on" writes_on

: >"$scripts"
mode hangs
begin=$(now)
ai recovery-point create s --consistency application >/dev/null
check "a pre-script that hangs: killed, and the agent's log says so" until_true 60 said_once_more "pre-script $run_dir/pre-script did not end within $script_seconds s and was killed" 0
check "the point was made, and is file-system-consistent" until_true 30 some_after "$begin" filesystem
check "none is called application-consistent" [ "$(count_after "$begin" application)" = 0 ]
mode works
check "one that works again: the same request gets its point" until_true 60 task_is succeeded
check "which is application-consistent" some_after "$begin" application
check "the post-script ran after each of them" grep -qE '^(pre hangs,post [a-z]+,)+(pre works,post works,)+$' <(runs)
check "and the host writes on" writes_on
left_over() { ! pgrep -af "^tail -f $run_dir/mode"; }
check "nothing is left of the script that was killed" left_over

# --- by the clock ------------------------------------------------------------------------------------------------------
begin=$(now)
check "every 10 seconds" replication --consistent-every 10s --consistency filesystem
check "they come by themselves" until_true 60 some_after "$begin" filesystem 2
between() {
    point_list | awk -v t="$begin" '
        $2 + 0 <= t + 0 { next }
        $3 == "filesystem" { if (last) { exit !(ok = $2 - last > 8 && $2 - last < 20 && others >= 3) } last = $2; others = 0 }
        $3 == "crash" { others++ }
        END { if (!ok) print last, others; exit !ok }' || { point_list | tail -n 20; return 1; }
}
check "and crash-consistent ones in between" between
check "no longer" replication --consistent-every 0s

# --- frozen by somebody else -------------------------------------------------------------------------------------------
begin=$(now)
fsfreeze --freeze "$mounted"
refuses "frozen by somebody else: no point is called file-system-consistent" "none of them file-system-consistent.*log says why.*is crash-consistent" \
    "$afterimage" recovery-point create s --consistency filesystem --wait
check "the points were made, and are crash-consistent" some_after "$begin" crash
check "none is more" [ "$(count_after "$begin" filesystem)" = 0 ]
check "the agent's log says why" said_once_more "cannot freeze the file system on $mounted: somebody else has frozen it; the point is crash-consistent" 0
# Who could freeze it now has thawed it.
still_frozen() { ! fsfreeze --freeze "$mounted" 2>/dev/null; }
check "who has frozen it is not meddled with" still_frozen
thaw
check "thawed: the host writes on" writes_on
ask filesystem "and there is a file-system-consistent point again"
check "proven by a freeze" is_proven_by "$point" filesystem freeze

# --- the agent is killed -----------------------------------------------------------------------------------------------
killed() { # WHEN CONSISTENCY: a point is being made, and the agent killed
    check "the agent is killed $1: the host writes on" writes_on
    start_agent "$loop_device"
    check "the agent is killed $1: the next one goes on, and makes the point" until_true 60 task_is succeeded
    check "the agent is killed $1: the application is not left waiting" writes_on
}
asked_to_its_death() {
    timeout 5 "$afterimage" recovery-point create s --consistency filesystem --wait </dev/null >/dev/null 2>&1 || true
    process_gone "$agent_pid"
}
for pause in 0 0.1 0.3; do
    ai recovery-point create s --consistency filesystem >/dev/null
    sleep "$pause"
    kill_now "$agent_pid"
    killed "$pause s after it was asked"
    replicating
done
for pause in 0 0.004; do
    start "$run_dir/kill-inside.log" python3 "$run_dir/kill-inside.py" "$agent_pid" "$pause"
    check "a freeze begins" until_true 30 asked_to_its_death
    killed "$pause s into a freeze"
    replicating
done

: >"$scripts"
mode hangs
ai recovery-point create s --consistency application >/dev/null
check "a pre-script runs" until_true 30 [ -e "$mounted/quiesced" ]
kill_now "$agent_pid"
check "the agent is killed meanwhile: no file system is frozen" timeout 30 touch "$mounted/touched"
mode works
start_agent "$loop_device"
check "the next one runs the post-script first: the application writes on" writes_on
check "and makes the point" until_true 60 task_is succeeded
check "with scripts of its own" grep -qE '^pre hangs,post works,(pre works,post works,)+$' <(runs)

: >"$scripts"
mode hangs
replicating
ai recovery-point create s --consistency application >/dev/null
check "a pre-script runs" until_true 30 [ -e "$mounted/quiesced" ]
kill -TERM "$agent_pid"
check "the agent is stopped meanwhile: it ends" until_true 30 process_gone "$agent_pid"
check "the agent is stopped meanwhile: the application is not left waiting" writes_on
check "the agent is stopped meanwhile: the post-script ran after the pre-script, whatever happened" grep -qE '^pre hangs,post [a-z]+,$' <(runs)
mode works
start_agent "$loop_device"
check "and the next one makes the point" until_true 60 task_is succeeded

check "Replicating, after all that" replicating
ask application "an application-consistent point"
check "the application was quiet in it, too" opened "$point" was_quiet
finish
