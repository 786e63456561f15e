#!/usr/bin/env bash
# alone
# tier: guest
# limit: 3000
# A Debian with a database in use, once with a BIOS and once with UEFI: drilled, lost, failed over, its recovery point changed twice, committed. Each time the
# database opens, and has every transaction that was acknowledged before the cut. In the drill the machine tries to get out of its network.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
for part in guest protected debian-disk; do source "$repository/tools/lib/$part.sh"; done

need_product guest-recovery
need_packages "${debian_disk_packages[@]}" ovmf iproute2
fetch_debian_disk
# What follows has a network of its own, so that what leaves the host is seen: a cable whose other end counts.
if [ -z "${AFTERIMAGE_RECOVERY_NET:-}" ]; then AFTERIMAGE_RECOVERY_NET=1 exec unshare --net --mount "$0" "$@"; fi
mount -t sysfs sysfs /sys # of this network
ip link set lo up
ip link add cable type veth peer name outside
sysctl -qw net.ipv6.conf.cable.disable_ipv6=1 net.ipv6.conf.outside.disable_ipv6=1
ip link set outside up
ip link set cable up
ip address add 10.99.0.1/24 dev cable
ip neighbour add 10.99.0.2 lladdr 02:00:00:00:00:02 dev cable nud permanent
ip route add default via 10.99.0.2

make_run_dir
need_space 8192
appliance_options=(--boots-at-once 2)
server=shop
ai() { "$afterimage" "$@" </dev/null; }
# task_log: the last task that was asked for; a failed-over machine becomes independent of recovery points in one of its own, after that.
task_log() { ai task list --server "$server" --limit 5 --json | python3 -c 'import json, sys; print(next(t["id"] for t in json.load(sys.stdin) if t["operation"] != "Hydrate Machine"))'; }
last_task() { ai task show "$(task_log)" --json; }
left_host() { cat /sys/class/net/outside/statistics/rx_packets; }

# A service of the host, on all its addresses, that notes whoever comes.
cat >"$run_dir/service.py" <<'SERVICE'
import select, socket, sys
tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for s in tcp, udp: s.bind(("0.0.0.0", 7777))
tcp.listen()
while True:
    for s in select.select([tcp, udp], [], [])[0]:
        who = s.accept()[1] if s is tcp else s.recvfrom(100)[1]
        print("visited by", who, flush=True)
SERVICE
start "$run_dir/visits" python3 "$run_dir/service.py"
: >>"$run_dir/visits"

# --- the machine -----------------------------------------------------------------------------------------------------
# prepare_disk FIRMWARE: $disk, a Debian that commits transactions from its first boot on and says on its console which are acknowledged
prepare_disk() {
    fetch_debian_disk "$1"
    disk=$run_dir/$1.img
    cp --sparse=always --no-preserve=mode "$debian_disk" "$disk"
    open_debian_disk "$disk"
    install -D -m 755 "$repository/tools/lib/transactions.py" "$debian_root/opt/transactions.py"
    install -D -m 755 "$repository/tools/machine/reach-out.py" "$debian_root/opt/reach-out.py"
    mkdir "$debian_root/var/lib/transactions"
    cat >"$debian_root/etc/systemd/system/transactions.service" <<'UNIT'
[Unit]
ConditionPathExists=!/var/lib/transactions/db
[Service]
ExecStart=/bin/sh -c 'exec >/dev/console; python3 /opt/transactions.py write /var/lib/transactions/db 100000 | while read -r number time; do echo "AFTERIMAGE-ACK $number"; done'
[Install]
WantedBy=multi-user.target
UNIT
    cat >"$debian_root/etc/systemd/system/up.service" <<'UNIT'
[Unit]
After=qemu-guest-agent.service
[Service]
ExecStart=/bin/sh -c 'echo "AFTERIMAGE-UP $(test -d /sys/firmware/efi && echo uefi || echo bios) root=$(findmnt -no SOURCE /) failed=$(systemctl --failed --no-legend | wc -l)" >/dev/console'
[Install]
WantedBy=multi-user.target
UNIT
    chroot "$debian_root" systemctl --quiet enable transactions up
    close_debian_disk
}

# firmware_hardware FIRMWARE: sets ${firmware_hardware[@]} of the machine at the primary site
firmware_hardware() {
    firmware_hardware=()
    [ "$1" = uefi ] || return 0
    cp /usr/share/OVMF/OVMF_VARS_4M.fd "$run_dir/vars.fd"
    firmware_hardware=(-drive "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd" -drive "if=pflash,unit=1,format=raw,file=$run_dir/vars.fd")
}

# --- checks ----------------------------------------------------------------------------------------------------------
cut_of() { points "$server" | awk -v id="$1" '$1 == id { print $2 }'; }
# check_script POINT: $run_dir/check.sh, which the machine runs: the database has all that was acknowledged before the point's cut
check_script() {
    promised=$(last_acknowledged "$console" "$(cut_of "$1")")
    echo "python3 /opt/transactions.py check /var/lib/transactions/db $promised && echo \"DATABASE ok, $promised promised\"" >"$run_dir/check.sh"
}
machine_ready=(--memory 768 --boot-check 'serial:AFTERIMAGE-UP' --boot-check agent --boot-timeout 900 --script-timeout 300 --wait)
says() { last_task | python3 -c 'import json, sys, re; t = json.load(sys.stdin); sys.exit(not any(re.search(sys.argv[1], l["line"]) for l in t["log"]))' "$1" || { ai task show "$(task_log)"; return 1; }; }
has_screenshot() {
    ai task screenshot "$(task_log)" "$run_dir/screen.png" && [ "$(head -c 8 "$run_dir/screen.png" | xxd -p)" = 89504e470d0a1a0a ]
}
drilled() { # POINT NETWORK...
    local point=$1
    shift
    check_script "$point"
    ai drill start "$server" --point "$point" --script "$run_dir/check.sh" "${machine_ready[@]}" "$@"
}
changed_to() {
    check_script "$1"
    ai failover change-recovery-point "$server" --point "$1" --yes "$server" --script "$run_dir/check.sh" --boot-timeout 900 --wait && says "DATABASE ok, [1-9][0-9]* promised"
}
failed_over() {
    check_script "$(points "$server" | tail -n 1 | cut -d' ' -f1)"
    ai failover start "$server" --yes "$server" --script "$run_dir/check.sh" "${machine_ready[@]}" && says "DATABASE ok, [1-9][0-9]* promised"
}
boots_by() { [[ "$(server_json "$server" | json instances.-1.bootLine)" == *"AFTERIMAGE-UP $1 "* ]] || { server_json "$server" | json instances.-1.bootLine; return 1; }; }
stops() { ai machine stop "$server" --wait && says "the machine has shut down" && [ "$(server_json "$server" | json instances.-1.step)" = stopped ]; }
starts_again() { ai failover start-machine "$server" --wait && says "boot check|the machine runs"; }
more_transactions() { local more=$(($(last_acknowledged "$console") + $1)); more_are_there() { [ "$(last_acknowledged "$console")" -ge "$more" ]; }; until_true 400 more_are_there; }
new_point() { local t; t=$(now); until_true 240 has_point_after "$server" "$t" && point=$(point_after "$server" "$t"); }

# walk FIRMWARE
walk() {
    local first second
    product_setup
    console=$run_dir/console-$1
    prepare_disk "$1"
    disk_file=$disk
    attach_loop "$disk_file"
    start_appliance
    start_agent "$loop_device"
    enrol "$server"
    tap_disk "$tap_socket" vda
    firmware_hardware "$1"
    start_guest "$console" -smp 2 -m 768 "${tap_disk[@]}" "${firmware_hardware[@]}"
    if ! wait_console "$console" 900 'AFTERIMAGE-UP' "$guest_pid" >/dev/null; then not_ok "$1: a Debian boots" "$(tail -n 3 "$console" | tr '\n' ' ')"; return; fi
    more_transactions 20 || { not_ok "$1: transactions are acknowledged" "$(tail -n 3 "$console" | tr '\n' ' ')"; return; }
    replicates() { ai replication start "$server" --wait; }
    check "$1: it replicates while it takes transactions" replicates
    more_transactions 20
    new_point && first=$point

    local before after
    before=$(left_host)
    echo "python3 /opt/reach-out.py 10.0.2.2 10.0.2.3 10.99.0.1 10.99.0.2 192.0.2.1" >"$run_dir/reach.sh"
    check "$1: drilled from a point, the database has what was acknowledged before its cut" drilled "$first" --network isolated
    check "$1: which its script says" says "DATABASE ok, [1-9][0-9]* promised"
    check "$1: the firmware is the one that the disk is made for" boots_by "$1"
    check "$1: the drill's screen is kept" has_screenshot
    cleared() { ai drill clear "$server" --graceful --wait && says "the machine has shut down"; }
    check "$1: the drill is cleared, its system shut down by the guest agent" cleared
    if [ "$1" = bios ]; then
        reaches() { ai drill start "$server" --point "$first" "${machine_ready[@]}" --network "$1" --script "$run_dir/reach.sh" && says "^ *tried"; }
        check "isolated: a machine tries to get out" reaches isolated
        after=$(left_host)
        nothing_left() { [ "$after" = "$before" ] && [ ! -s "$run_dir/visits" ] && ! says "reached" >/dev/null || { echo "$((after - before)) packets left; $(cat "$run_dir/visits")"; return 1; }; }
        check "isolated: no packet has left, no service of the host was reached" nothing_left
        ai drill clear "$server" --wait >/dev/null
        check "user: the same machine tries" reaches user
        seen() { [ "$(left_host)" -gt "$after" ] && [ -s "$run_dir/visits" ]; }
        check "user: and both are seen, so the test sees what there is" seen
        ai drill clear "$server" --wait >/dev/null
    fi

    more_transactions 20
    new_point && second=$point
    more_transactions 20
    kill_now "$guest_pid"
    check "$1: lost, it is failed over, and the database has what was acknowledged before the last cut" failed_over
    check "$1: its recovery point is changed" changed_to "$first"
    check "$1: and changed again" changed_to "$second"
    check "$1: it is committed" ai failover commit "$server" --yes "$server"
    check "$1: stopped, its system shuts down" stops
    check "$1: and it is started again" starts_again
    ai server remove "$server" --delete-points --stop-machine --wait --yes "$server" >/dev/null 2>&1 || not_ok "$1: unregistered" "server remove"
    unprotect
}

for firmware in bios uefi; do walk "$firmware"; done
finish
