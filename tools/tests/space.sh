#!/usr/bin/env bash
# limit: 240
# A store whose file system fills up: it says so before anything is refused; told to, it drops recovery points before their time, but
# neither the newest nor held ones; and it says when there is room again.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product space
make_run_dir
truncate -s 512M "$run_dir/small.img"
mkfs.ext4 -q -m 0 "$run_dir/small.img"
mkdir "$run_dir/small"
mount -o loop "$run_dir/small.img" "$run_dir/small"
store_elsewhere=$run_dir/small/store
appliance_options=(--tighten-when-low)
protect 32
start_writer
"$afterimage" replication start s --policy keep-all --wait </dev/null >/dev/null
until_true 60 point_count_is s 20 || give_up "no recovery points" "$run_dir/appliance.log"
held=$(points s | sed -n '3s/ .*//p')
"$afterimage" recovery-point hold s "$held" --name gold </dev/null >/dev/null

status_field() { "$afterimage" status --json </dev/null | json "$1"; }
space_is() { [ "$(status_field store.space)" = "$1" ]; }
check "there is room" space_is ok
# Space is low below a quarter of so small a file system.
free=$(($(df --output=avail -k "$run_dir/small" | tail -n 1) / 1024))
fallocate -l "$((free - 90))M" "$run_dir/small/ballast"
check "status says that space is low" until_true 60 space_is low
alerted() { [ "$(status_field alerts.0.kind)" = store-low ] && "$afterimage" status </dev/null | grep -q "ALERT: the store is nearly full"; }
check "it is an alert" alerted
check "nothing is refused yet" server_state_is s Replicating
is_thin() { [ "$(points s | wc -l)" -le 12 ]; }
check "recovery points go before their time" until_true 60 is_thin
still_held() { points s | grep -q "^$held "; }
check "the held one stays" still_held
rm "$run_dir/small/ballast"
check "status says that there is room again" until_true 60 space_is ok
no_alert() { [ "$(status_field alerts)" = "[]" ]; }
check "no alert is left" no_alert
audited() {
    local events
    events=$("$afterimage" event list --limit 200 </dev/null)
    grep -qE "Store space +ok → low: .* free; recovery points go before their time" <<<"$events" && grep -qE "Store space +low → ok: .* free" <<<"$events" || { grep "Store space" <<<"$events"; return 1; }
}
check "both are in the audit log" audited
stop_writer || true
check "the next recovery point is exact" exact_after "$(now)"
unprotect
until_true 10 umount "$run_dir/small" 2>/dev/null || not_ok "space" "the file system cannot be unmounted"
finish
