#!/usr/bin/env bash
# limit: 240
# A block of the store rots: scrubbing finds it and says which recovery points it touches; the source gives it back while it still has
# the same there; when it has not, that is said too, and nobody ever reads wrong data.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product scrub
make_run_dir
appliance_options=(--scrub-rate 64MiB --scrub-pause 1s)
protect 16
"$afterimage" replication start s --policy all:1h --wait </dev/null >/dev/null
point=$("$afterimage" recovery-point create s --wait --json </dev/null | json result.recoveryPoint)
[ -n "$point" ] || give_up "no recovery point" "$run_dir/appliance.log"

# rot BLOCK: turns bits of the newest copy of a block of the disk, wherever the store has put it. Random data is not compressed.
rot() {
    python3 - "$disk_file" "$1" "$store"/segments/*.seg <<'PYTHON'
import mmap, os, sys
disk, block = sys.argv[1], int(sys.argv[2])
with open(disk, "rb") as f:
    f.seek(block * 4096)
    content = f.read(4096)
for path in reversed(sys.argv[3:]):
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view: at = view.rfind(content)
    if at >= 0:
        os.pwrite(fd, bytes(b ^ 0x10 for b in content[100:103]), at + 100)
        os.fsync(fd)
        sys.exit()
    os.close(fd)
sys.exit("block %d is in no segment" % block)
PYTHON
}
status_field() { "$afterimage" status --json </dev/null | json "$1"; }
events() { "$afterimage" event list --limit 200 </dev/null; }
has_event() { events | grep -qE -- "$1"; }
holds_all() {
    local status=0
    "$afterimage" recovery-point export s "$point" --to raw --output "$run_dir/point.raw" --wait </dev/null && cmp "$run_dir/point.raw" "$disk_file" || status=1
    rm -f "$run_dir/point.raw"
    return "$status"
}

check "a pass is in the audit log" until_true 30 has_event "Scrub ended +.* read; everything is as it was written"
shows_scrub() { "$afterimage" status </dev/null | grep -qE "scrub +last pass ended .*no damage known"; }
check "status says when the last pass ended" shows_scrub

# --- the source has it ----------------------------------------------------------------------------------------------
rot 1000
check "damage is found, with the points that it touches" until_true 60 has_event "Damage found +disk vda, block 1000; touches .*rp-"
check "it is repaired from the source" until_true 60 has_event "Damage repaired +disk vda, block 1000"
sound() { [ "$(status_field store.scrub.badBlockCount)" = 0 ] && [ "$(status_field alerts)" = "[]" ]; }
check "no alert is left" until_true 30 sound
check "the point holds what the disk held" holds_all

# --- the source has something else ------------------------------------------------------------------------------------
kill_now "$agent_pid"
rot 2000
alert() { status_field alerts.0.text | grep -qE -- "$1"; }
check "source away: status has an alert with the points" until_true 60 alert "s: the store has lost 1 block of disk vda; .* recovery points are touched .*rp-"
damaged_point() { "$afterimage" recovery-point list s </dev/null | grep -E "^$point " | grep -q "DAMAGED: 1 block"; }
check "source away: the list of recovery points says it" damaged_point
refuses "source away: an export says what is damaged" "block 2000" "$afterimage" recovery-point export s "$point" --to raw --output "$run_dir/bad.raw" --wait
nothing_made() { ! compgen -G "$run_dir/bad.raw*"; }
check "source away: no file of it is made" nothing_made
cp --sparse=always "$disk_file" "$run_dir/before.img"
head -c 4096 /dev/urandom | dd of="$disk_file" bs=4096 seek=2000 conv=notrunc status=none
blockdev --flushbufs "$loop_device"
start_agent "$loop_device"
check "the source has something else: that is said" until_true 90 has_event "Damage not repaired +disk vda, block 2000: the source has something else"
check "the source has something else: the alert says it" until_true 30 alert "does not have them any more"
sound_newest() { alert "the newest sound one is rp-"; }
check "the source has something else: the alert names a sound point" until_true 60 sound_newest
unprotect
finish
