#!/usr/bin/env bash
# limit: 240
# store-sigkill.sh [--kills N] [--fs ext4|xfs]... [--seed N] [--keep DIR]: SIGKILL at random moments of a store that receives epochs, drops and
# holds points, writes, seals, forks and commits forks, exports, scrubs itself, merges, punches and evacuates, all at once; on ext4 and XFS
# on loop devices. After each kill `store check` is clean, everything that was acknowledged is there byte for byte, what was dropped
# is not, and no file is left that nothing names. --kills: per file system, 10 when not said. --keep: where a store that failed is copied to.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/build.sh"

kills=10 systems=() seed=$RANDOM keep=
while [ $# -gt 0 ]; do
    case $1 in
    --kills) kills=$2; shift 2 ;;
    --fs) systems+=("$2"); shift 2 ;;
    --seed) seed=$2; shift 2 ;;
    --keep) keep=$2; shift 2 ;;
    -h | --help) sed -n '3,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "unknown argument $1 (see --help)" ;;
    esac
done
[ ${#systems[@]} -gt 0 ] || systems=(ext4 xfs)
require_root
need_packages "${run_packages[@]}" xfsprogs
if [ -z "${AFTERIMAGE:-}" ]; then # tools/test has just built everything
    build_release
    AFTERIMAGE=$build_dir/release/afterimage
fi
torture=$(dirname "$AFTERIMAGE")/store-torture
make_run_dir
need_space 1200

# kill_once: in $why what is wrong after it, nothing when all is well.
kill_once() {
    local status=0 pid
    why=
    "$torture" run "${places[@]}" --target "$mounted/export" >"$work/run.log" 2>&1 </dev/null &
    pid=$!
    defer stop_process "$pid" "$(process_start_time "$pid")"
    # From before it has opened the store until it has been at it for a while.
    sleep "$(awk -v r="$RANDOM" 'BEGIN { printf "%.3f", r / 32768 * r / 32768 * 2.5 }')"
    { kill -KILL "$pid" && wait "$pid"; } 2>/dev/null || status=$?
    unset 'cleanup_stack[-1]'
    [ "$status" = 137 ] || { why="it ended by itself, with status $status: $(tail -n 2 "$work/run.log" | tr '\n' ' ')"; return; }
    # Killed before there was a store.
    [ -e "$mounted/store/MANIFEST" ] || [ -s "$work/log" ] || return 0
    "$AFTERIMAGE" store check "$mounted/store" >"$work/check.log" 2>&1 || { why="store check: status $?, $(grep -E '^(DAMAGE|BAD|error)' "$work/check.log" | head -n 3 | tr '\n' ' ')"; return; }
    "$torture" verify "${places[@]}" >"$work/verify.log" 2>&1 || { why="verify: $(grep -vE '^during ' "$work/verify.log" | head -n 4 | tr '\n' ' ')"; return; }
    grep '^during ' "$work/verify.log" >>"$work/stages" || true
    "$AFTERIMAGE" store check --no-data "$mounted/store" >"$work/check.log" 2>&1 && ! grep -q 'files that nothing names' "$work/check.log" ||
        why="after it was opened: $(tail -n 2 "$work/check.log" | tr '\n' ' ')"
}

passed=0 failed=0
loop_on() { # SYSTEM
    local system=$1 mounted=$run_dir/$1.mounted work=$run_dir/$1 why places number
    mkdir "$mounted" "$work"
    truncate -s 1G "$work/disk"
    case $system in
    ext4) mkfs.ext4 -q -F "$work/disk" ;;
    xfs) mkfs.xfs -q "$work/disk" ;;
    *) die "no file system $system here" ;;
    esac
    attach_loop "$work/disk"
    mount "$loop_device" "$mounted"
    places=(--directory "$mounted/store" --log "$work/log" --stages "$work/now" --seed "$seed")
    for ((number = 1; number <= kills; number++)); do
        kill_once
        if [ -z "$why" ]; then passed=$((passed + 1)); continue; fi
        failed=$((failed + 1))
        say "$system, seed $seed, kill $number: $why"
        if [ -n "$keep" ]; then mkdir -p "$keep" && cp -a --sparse=always "$mounted/store" "$work"/{log,now,*.log} "$keep"; fi
        break
    done
    if [ -n "$why" ]; then not_ok "$system: $kills kills" "after kill $number, seed $seed: $why"; else ok "$system: $kills kills"; fi
    say "$system: $(sed -n 's/^verified //p' "$work/verify.log" 2>/dev/null); killed in the middle of:"
    sed 's/^during //' "$work/stages" 2>/dev/null | sort | uniq -c | sort -rn >&2 || true
    umount "$mounted"
    losetup -d "$loop_device"
}
for system in "${systems[@]}"; do loop_on "$system"; done
say "$passed passed, $failed failed"
finish
