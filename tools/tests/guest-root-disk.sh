#!/usr/bin/env bash
# tier: guest
# limit: 900
# A whole Debian on its root disk, mounted and busy, followed by the live tap under the unit that systemd gets; it is lost, and comes up elsewhere.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
for part in guest protected debian-disk; do source "$repository/tools/lib/$part.sh"; done

make_run_dir
need_product guest-root-disk
need_space 6144
need_packages "${debian_disk_packages[@]}" gcc libc6-dev
fetch_debian_disk
product_setup
disk=$run_dir/disk.img console=$run_dir/console hands=$run_dir/hands server=root
seconds_began=$(now)

# --- the machine -----------------------------------------------------------------------------------------------------
cp --sparse=always --no-preserve=mode "$debian_disk" "$disk"
open_debian_disk "$disk"
put_release "$debian_root" "$afterimage"
install -m 644 -t "$debian_root/etc/systemd/system" "$repository/systemd/afterimage-agent.service"
mkdir "$debian_root/etc/afterimage"
echo 'AFTERIMAGE_AGENT_OPTIONS=--disk vda=/dev/vda' >"$debian_root/etc/afterimage/agent.env"
gcc -O2 -Wall -static -o "$debian_root/usr/local/bin/recorder" "$repository/tools/machine/recorder.c"
for part in witness hands; do
    install -m 755 "$repository/tools/machine/$part.sh" "$debian_root/usr/local/bin/$part"
    cat >"$debian_root/etc/systemd/system/$part.service" <<UNIT
[Service]
ExecStart=/bin/sh -c 'exec /usr/local/bin/$part >/dev/console'
[Install]
WantedBy=multi-user.target
UNIT
done
chroot "$debian_root" systemctl --quiet enable witness hands
close_debian_disk

# A person at the machine types COMMAND; what it said is in $said. Fails as COMMAND does.
mkfifo "$hands.in" "$hands.out"
exec {typed}<>"$hands.in" {shown}<>"$hands.out"
at_machine() {
    local line lines=()
    printf '%s\n' "$*" >&"$typed"
    while IFS= read -r -t 120 -u "$shown" line; do
        case $line in
        HANDS-STATUS\ *) said=$(printf '%s\n' "${lines[@]}"); [ "${line#* }" = 0 ]; return ;;
        esac
        lines+=("$line")
    done
    said="no answer within 120 s; the console ends with: $(tail -n 3 "$console" | tr '\n' ' ')"
    return 1
}
machine_says() { at_machine "$@" || { echo "$said"; return 1; }; }
show_machine() {
    say "the end of the agent's journal:"
    machine_says 'journalctl -u afterimage-agent -o cat -n 25 --no-pager' || true
    sed 's/^/    /' <<<"$said" >&2
}
acknowledged_at_least() { [ "$(last_acknowledged "$console")" -ge "$1" ]; }

start_guest "$console" -smp 2 -m 1024 -drive "file=$disk,format=raw,if=virtio,cache=none" -netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile= \
    -device virtio-serial-pci -chardev "pipe,id=hands,path=$hands" -device virtserialport,chardev=hands,name=hands
first=$(wait_console "$console" 240 'AFTERIMAGE-CHECK' "$guest_pid") || true
if [[ $first == *"AFTERIMAGE-CHECK ok boots=1 "* ]]; then ok "a Debian boots from its disk"; else not_ok "a Debian boots from its disk" "${first:-$(tail -n 3 "$console" | tr '\n' ' ')}"; finish; fi
say "$first"

# --- its agent, as the README says -----------------------------------------------------------------------------------
appliance_options=(--advertise 10.0.2.2) # where QEMU's network has this host
start_appliance
followed() { machine_says afterimage agent disks && grep -E '^/dev/vda .*' <<<"$said"; }
check "the agent finds the root disk" followed
echo "$said" >&2
at_machine systemctl enable --now afterimage-agent || true
echo "$said" >&2
"$afterimage" site-pair create pair --type zone-to-zone --primary here --secondary there </dev/null >/dev/null
enrolment=$("$afterimage" server add "$server" --pair pair </dev/null | grep -o 'afterimage agent enroll --token [^ ]*')
check "it is enrolled with the command that the appliance prints" machine_says "$enrolment"
echo "$said" >&2
check "its agent connects" until_true 60 server_state_is "$server" Initialized
show_machine
"$afterimage" status >&2
"$afterimage" server show root >&2
