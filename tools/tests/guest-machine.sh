#!/usr/bin/env bash
# alone
# tier: guest
# limit: 420
# The machine of the quickstart is an honest witness: it survives being killed at any moment, and it notices damage.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/guest.sh"

make_run_dir
fetch_qemu10
disk=$run_dir/disk.img console=$run_dir/console
dataOffset=$((25 << 20)) # of the data partition in the image (tools/make-machine)
"$repository/tools/make-machine" --size 192 --output "$disk" >/dev/null

boot() { start_guest "$console" -drive "file=$disk,format=raw,if=virtio,cache=none" "$@"; }
verdict() { wait_console "$console" 60 '^AFTERIMAGE-CHECK' "$guest_pid" || echo "no verdict: $(tail -n 3 "$console" | tr '\n' ' ')"; }
acknowledged_at_least() { [ "$(last_acknowledged "$console")" -ge "$1" ]; }

boot
line=$(verdict)
[[ $line == "AFTERIMAGE-CHECK ok boots=1 records=0 "* ]] && ok "a new machine boots and its check passes" || not_ok "a new machine boots and its check passes" "$line"

# Killed five times in the middle of writing, at moments that differ.
acknowledged=0
for round in 1 2 3 4 5; do
    until_true 60 acknowledged_at_least $((acknowledged + 30)) || true
    sleep "0.$((RANDOM % 10))"
    kill_now "$guest_pid"
    acknowledged=$(last_acknowledged "$console")
    boot -smbios type=1,serial=recorder:rate=$((20 + 20 * round)):bulk=2048
    line=$(verdict)
    last=$(check_field "$line" last)
    name="killed while writing, round $round: nothing acknowledged is lost"
    if [[ $line == "AFTERIMAGE-CHECK ok "* ]] && [ "${last:-0}" -ge "$acknowledged" ] && [ "$acknowledged" -gt 0 ]; then ok "$name"; else not_ok "$name" "acknowledged $acknowledged, then: $line"; fi
done
until_true 60 acknowledged_at_least $((acknowledged + 200)) || true
kill_now "$guest_pid"
boot -smbios type=1,serial=recorder:once # leaves a clean file system
line=$(verdict)
until_true 20 process_gone "$guest_pid" && [[ $line == *ok* ]] && ok "checks only, when asked, and powers off" || not_ok "checks only, when asked, and powers off" "$line"

# Damage, each on a copy of the good disk.
mv "$disk" "$run_dir/good.img"
block_of() { debugfs -R "bmap /$1 $2" "$run_dir/good.img?offset=$dataOffset" 2>/dev/null; }
damaged() {
    local name=$1 pattern=$2 line
    boot
    line=$(verdict)
    if [[ $line =~ ^AFTERIMAGE-CHECK\ FAILED ]] && [[ $line =~ $pattern ]]; then ok "$name"; else not_ok "$name" "$line"; fi
    until_true 20 process_gone "$guest_pid" || not_ok "$name" "the machine went on after its check had failed"
    stop_process "$guest_pid"
}
fresh_copy() { cp --sparse=always "$run_dir/good.img" "$disk"; }

fresh_copy
printf '\377' | dd of="$disk" bs=1 seek=$((dataOffset + $(block_of records 0) * 4096 + 1000)) conv=notrunc status=none
damaged "one changed byte in a record is noticed" "bad sum in the record"

fresh_copy
dd if=/dev/zero of="$disk" bs=512 seek=$(((dataOffset + $(block_of bulk 777) * 4096) / 512)) count=1 conv=notrunc status=none
damaged "a lost sector of the bulk data is noticed" "bad sector"

# One block of records as it was some hundred records earlier: every sum in it is right, but rewrites are missing.
fresh_copy
boot -smbios type=1,serial=recorder:rate=100
verdict >/dev/null
until_true 60 acknowledged_at_least $(($(check_field "$line" last) + 400)) || true
kill_now "$guest_pid"
dd if="$run_dir/good.img" of="$disk" bs=4096 iflag=skip_bytes oflag=seek_bytes count=4 conv=notrunc status=none \
    skip=$((dataOffset + $(block_of records 0) * 4096)) seek=$((dataOffset + $(block_of records 0) * 4096))
damaged "blocks that went back in time are noticed, though every sum in them is right" "was written after"

fresh_copy
dd if=/dev/zero of="$disk" bs=4096 count=2 conv=notrunc status=none \
    seek=$(((dataOffset + 4096 * $(dumpe2fs "$disk?offset=$dataOffset" 2>/dev/null | sed -n 's/.*Block bitmap at \([0-9]*\).*/\1/p' | head -n 1)) / 4096))
damaged "a damaged file system is noticed" "file system|cannot mount"
finish
