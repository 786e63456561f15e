#!/usr/bin/env bash
# limit: 420
# Machines on bridges: one that is there already, and one of the appliance's own with a dnsmasq. Whatever is killed, nothing of it is left in the end.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product bridge
need_packages iproute2 dnsmasq-base
fetch_busybox
# A network of its own, and a /sys that shows it: what is made here is nobody else's.
if [ -z "${AFTERIMAGE_BRIDGE_NET:-}" ]; then AFTERIMAGE_BRIDGE_NET=1 exec unshare --net --mount "$0" "$@"; fi
mount -t sysfs sysfs /sys
ip link set lo up

make_run_dir
ai() { "$afterimage" "$@" </dev/null; }
ours() { ls /sys/class/net | grep -E '^af[tb][0-9a-f]{8}' || true; }
dnsmasqs() { pgrep -f "^[^ ]*dnsmasq .*$secondary_state/" || true; }
nothing_left() { [ -z "$(ours)" ] && [ -z "$(dnsmasqs)" ] && [ ! -e "$secondary_state/bridges" -o -z "$(ls "$secondary_state/bridges" 2>/dev/null)" ] || { ours; dnsmasqs; ls "$secondary_state/bridges"; return 1; }; }
master_of() { ip -o link show "$1" | sed -n 's/.* master \([^ ]*\) .*/\1/p'; }
own=(--network bridge --bridge-subnet 10.213.7.1/24)
drill() { ai drill start s --memory 64 "$@" --wait; }
cleared() { ai drill clear s --wait && nothing_left; }

protect 8
ai replication start s --epoch-ms 300 --wait >/dev/null
refuses "a bridge that is not there" "no bridge nothere" "$afterimage" drill start s --network bridge --bridge nothere
refuses "an address outside of the network" "outside of the recovery network" "$afterimage" drill start s "${own[@]}" --ip 10.213.8.20/24
refuses "the host's own address" "own address" "$afterimage" drill start s "${own[@]}" --ip 10.213.7.1/24
ip address add 10.214.0.5/16 dev lo
refuses "a network that the host has already" "overlaps" "$afterimage" drill start s --network bridge --bridge-subnet 10.214.7.1/24

names() { bridge=$(ours | grep -o 'afb[0-9a-f]*') tap=$(ours | grep -o 'aft[0-9a-f]*') || true; }

# --- a bridge of its own -----------------------------------------------------------------------------------------------
on_own_bridge() {
    drill "${own[@]}" --ip 10.213.7.20/24 || return 1
    names
    [ "$(master_of "$tap")" = "$bridge" ] && ip -o -4 address show dev "$bridge" | grep -q '10\.213\.7\.1/24' && [ "$(dnsmasqs | wc -l)" = 1 ] || { ip address; dnsmasqs; return 1; }
}
check "a machine is on a bridge that was made for it" on_own_bridge
names
reserved() { grep -rqE '^52:54:00(:[0-9a-f]{2}){3},10\.213\.7\.20$' "$secondary_state/bridges/$bridge/hosts"; }
check "its address is reserved for its card" reserved
gives_out() {
    printf '#!/bin/sh\n[ "$1" != bound ] || echo "got $ip"\n' >"$run_dir/bound"
    chmod 755 "$run_dir/bound"
    ip link add client type veth peer name port
    ip link set port master "$bridge" up
    ip link set client up
    "$busybox" udhcpc -i client -n -q -t 10 -T 2 -s "$run_dir/bound" 2>&1 | tee "$run_dir/udhcpc" | grep -q 'got 10\.213\.7\.' || { cat "$run_dir/udhcpc"; return 1; }
    ip link delete client
}
check "others get one of the others" gives_out
refuses "a second drill" "exists already" "$afterimage" drill start s "${own[@]}"
check "cleared, nothing of it is left" cleared

# --- whatever is killed ------------------------------------------------------------------------------------------------
machine_pid() { server_json s | json instances.-1.pid; }
check "again on an own bridge" on_own_bridge
names
qemu=$(machine_pid)
owner=$(cat "/sys/class/net/$bridge/ifalias")
kill_now "$appliance_pid"
check "the bridge outlives the appliance, as the machine does" test -e "/sys/class/net/$tap/master"
kill_now "$qemu" $(dnsmasqs)
ip tuntap add dev aft00000000 mode tap
ip link set dev aft00000000 alias "$owner drill-gone"
start_appliance
stale_is_gone() { [ ! -e /sys/class/net/aft00000000 ]; }
check "a tap of a machine that is gone is removed at the start" until_true 30 stale_is_gone
check "cleared after that, nothing is left" cleared

# --- a bridge that is there ----------------------------------------------------------------------------------------------
ip link add br9 type bridge
ip link set br9 up
on_others_bridge() {
    drill --network bridge --bridge br9 || return 1
    tap=$(ours | grep -o 'aft[0-9a-f]*')
    [ "$(master_of "$tap")" = br9 ] && [ -z "$(dnsmasqs)" ]
}
check "it replicates again" until_true 60 server_state_is s Replicating
check "a machine is on a bridge of the host" on_others_bridge
check "cleared, its tap is gone" cleared
check "and the bridge is not" test -e /sys/class/net/br9

# --- a failover that cannot be ---------------------------------------------------------------------------------------------
printf '#!/bin/sh\n[ "$1" != --version ] || exec echo "QEMU emulator version 10.0.0"\necho "no machine today" >&2\nexit 1\n' >"$run_dir/qemu"
chmod 755 "$run_dir/qemu"
kill_now "$appliance_pid"
good=$AFTERIMAGE_QEMU
AFTERIMAGE_QEMU=$run_dir/qemu
start_appliance
until_true 60 server_state_is s Replicating || true
refuses "a failover whose QEMU does not start" "no machine today" "$afterimage" failover start s --yes s --memory 64 "${own[@]}" --wait
check "is rolled back, and leaves nothing" nothing_left
AFTERIMAGE_QEMU=$good
finish
