# A whole Debian on its root disk, mounted and busy, in a guest; its agent, under the unit that systemd gets, follows that disk by the live tap. For tests of the
# guest lane. On its console: AFTERIMAGE-CHECK when it is up (tools/machine/witness.sh), AFTERIMAGE-ACK for each record.
for part in guest protected debian-disk; do source "$(dirname "${BASH_SOURCE[0]}")/$part.sh"; done

# root_disk_machine TEST [AGENT-OPTION...]: makes $disk and boots it; $first is what it says of itself.
root_disk_machine() {
    need_product "$1"
    need_space 6144
    need_packages "${debian_disk_packages[@]}" gcc libc6-dev
    fetch_debian_disk
    product_setup
    shift
    disk=$run_dir/disk.img boots=0 hands=$run_dir/hands server=root

    cp --sparse=always --no-preserve=mode "$debian_disk" "$disk"
    open_debian_disk "$disk"
    put_release "$debian_root" "$afterimage"
    install -m 644 -t "$debian_root/etc/systemd/system" "$repository/systemd/afterimage-agent.service"
    mkdir "$debian_root/etc/afterimage"
    echo "AFTERIMAGE_AGENT_OPTIONS=--disk vda=/dev/vda $*" >"$debian_root/etc/afterimage/agent.env"
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

    mkfifo "$hands.in" "$hands.out"
    exec {typed}<>"$hands.in" {shown}<>"$hands.out"

    boot_root_disk "a Debian boots from its disk"
    first=$line
}

# boot_root_disk WHAT: boots $disk, for the first time or again; sets $console, $guest_pid, and $line to what the machine says of itself.
boot_root_disk() {
    boots=$((boots + 1)) console=$run_dir/console-$boots
    start_guest "$console" -smp 2 -m 1024 -drive "file=$disk,format=raw,if=virtio,cache=none" -netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile= \
        -device virtio-serial-pci -chardev "pipe,id=hands,path=$hands" -device virtserialport,chardev=hands,name=hands
    line=$(wait_console "$console" 400 'AFTERIMAGE-CHECK' "$guest_pid") || true
    if [[ $line == *"AFTERIMAGE-CHECK ok boots=$boots "* ]]; then ok "$1"; else not_ok "$1" "${line:-$(tail -n 3 "$console" | tr '\n' ' ')}"; finish; fi
    say "$line"
}

# A person at the machine types COMMAND; what it said is in $said. Fails as COMMAND does.
at_machine() {
    local line lines=()
    printf '%s\n' "$*" >&"$typed"
    while IFS= read -r -t 240 -u "$shown" line; do
        case $line in
        HANDS-STATUS\ *) said=$(printf '%s\n' "${lines[@]}"); [ "${line#* }" = 0 ]; return ;;
        esac
        lines+=("$line")
    done
    said="no answer within 240 s; the console ends with: $(tail -n 3 "$console" | tr '\n' ' ')"
    return 1
}
machine_says() { at_machine "$@" || { echo "$said"; return 1; }; }
# The last words of both sites, for a check that fails.
show_logs() {
    say "the end of appliance.log:"
    tail -n 8 "$run_dir/appliance.log" 2>/dev/null | sed 's/^/    /' >&2
    ! alive "$guest_pid" || at_machine 'journalctl -u afterimage-agent -o cat -n 15 --no-pager' || true
    say "the agent's journal, or the machine's last answer:"
    sed 's/^/    /' <<<"${said:-}" >&2
}

# root_disk_agent: its agent, as the README says.
root_disk_agent() {
    appliance_options=(--advertise 10.0.2.2) # where QEMU's network has this host
    start_appliance
    can_follow() { machine_says afterimage agent disks && grep -E '^/dev/vda +disk .* / +yes *$' <<<"$said" || { echo "$said"; return 1; }; }
    check "the agent can follow the root disk, mounted as it is" can_follow
    check "its unit starts under systemd" machine_says 'systemctl enable --now afterimage-agent && systemctl is-active afterimage-agent'
    "$afterimage" site-pair create pair --type zone-to-zone --primary here --secondary there </dev/null >/dev/null
    enrolment=$("$afterimage" server add "$server" --pair pair </dev/null | grep -o 'afterimage agent enroll --token [^ ]*')
    check "it is enrolled with the command that the appliance prints" machine_says "$enrolment"
    connects() { until_true 180 server_state_is "$server" Initialized || server_json "$server"; }
    check "it connects" connects
    specified() {
        local view
        view=$(server_json "$server")
        [ "$(json specification.cpus <<<"$view") $(json specification.memoryMiB <<<"$view") $(json specification.firmware <<<"$view")" = "2 1024 bios" ] &&
            [ "$(json specification.kernel <<<"$view")" = "$(check_field "$first" kernel)" ] && [ "$(json specification.warnings <<<"$view")" = "[]" ] || { json specification <<<"$view"; return 1; }
    }
    check "what its recovery machine must be is known, and nothing would keep that from booting" specified
}

# as_it_was BOOTS: what a machine said when it was up, in $line, is what the first had said: its BOOTS-th boot, a file system without errors, the same units.
as_it_was() {
    local field
    [ "$(check_field "$line" boots)" = "$1" ] && [ "$(check_field "$line" errors)" = 0 ] || { echo "$line"; return 1; }
    for field in root failed state kernel; do [ "$(check_field "$line" $field)" = "$(check_field "$first" $field)" ] || { echo "$line"; return 1; }; done
}
