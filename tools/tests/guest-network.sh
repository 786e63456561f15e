#!/usr/bin/env bash
# tier: guest
# limit: 1500
# A Debian with an address built in and a service that listens: a boot check by its port passes, and leaves no forward; its guest agent gives it
# another address.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
for part in protected debian-disk; do source "$repository/tools/lib/$part.sh"; done

need_product guest-network
need_packages "${debian_disk_packages[@]}" iproute2
fetch_debian_disk
make_run_dir
need_space 4096
ai() { "$afterimage" "$@" </dev/null; }
last_log() { ai task show "$(ai task list --server s --limit 1 --json | json 0.id)"; }
says() { last_log | grep -qE "$1" || { last_log; return 1; }; }
machine_pid() { server_json s | json instances.-1.pid; }
no_forward() { ! ss -Hltnp | grep -q "pid=$(machine_pid),"; }
drilled() { ai drill start s --memory 512 --boot-timeout 600 --wait "$@"; }
cleared() { ai drill clear s --wait >/dev/null; }

disk_file=$run_dir/disk.img
cp --sparse=always --no-preserve=mode "$debian_disk" "$disk_file"
open_debian_disk "$disk_file"
printf '[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n' >"$debian_root/etc/systemd/network/cable.network"
cat >"$debian_root/etc/systemd/system/listens.service" <<'UNIT'
[Service]
ExecStart=/usr/bin/python3 -m http.server 8080
[Install]
WantedBy=multi-user.target
UNIT
chroot "$debian_root" systemctl --quiet enable listens
close_debian_disk
attach_loop "$disk_file"
product_setup
start_appliance
start_agent "$loop_device"
enrol s
check "its disk is replicated" ai replication start s --wait

check "a boot check by the port of its service passes" drilled --boot-check tcp:8080
check "which its task says" says "boot check passed .*: port 8080 takes connections"
check "and leaves no forward" no_forward
check "cleared" cleared

echo "ip -4 -o address show scope global" >"$run_dir/shows.sh"
check "with an address that is not the one built in" drilled --boot-check agent --ip 10.0.2.77/24 --script "$run_dir/shows.sh" --script-timeout 120
check "its guest agent gives it to the card" says "the machine's guest agent gave e[a-z0-9]+ the address 10\.0\.2\.77/24"
check "which then has it, and no other" says "inet 10\.0\.2\.77/24"
check "not the one built in" bash -c '! "$1" task show "$2" | grep -q "inet 10.0.2.15"' _ "$afterimage" "$(ai task list --server s --limit 1 --json | json 0.id)"
check "cleared" cleared
finish
