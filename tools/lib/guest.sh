# QEMU guests run by the tools themselves (the primary machine; boot tests). Recovery machines are the appliance's.

guest_hardware=(-nodefaults -no-user-config -display none -no-reboot -machine pc -accel "tcg,thread=multi" -cpu "qemu64,+rdrand" -smp 1 -m 256)

# tap_disk SOCKET EXPORT: sets ${tap_disk[@]}, QEMU's arguments for a disk behind the agent's tap. While the agent is away the
# machine waits for it, instead of seeing errors.
tap_disk() {
    tap_disk=(-blockdev "driver=nbd,node-name=disk0,server.type=unix,server.path=$1,export=$2,reconnect-delay=600" -device virtio-blk-pci,drive=disk0)
}

# start_guest CONSOLE ARG...: starts QEMU with the usual hardware plus ARGs; every console line goes to the file CONSOLE
# with the time of its receipt. Sets $guest_pid. Give it its disk and, if wanted, -smbios.
start_guest() {
    local console=$1
    shift
    : >"$console"
    setpriv --pdeathsig KILL "$AFTERIMAGE_QEMU" "${guest_hardware[@]}" -serial stdio "$@" </dev/null > >(exec python3 "$repository/tools/lib/stamp.py" "$console") 2>&1 &
    guest_pid=$!
    disown "$guest_pid"
    defer stop_process "$guest_pid" "$(process_start_time "$guest_pid")"
}

# console_line CONSOLE PATTERN: prints the first line that matches, without its time.
console_line() {
    PATTERN=$2 awk '{ sub(/^[0-9.]+ /, "") } $0 ~ ENVIRON["PATTERN"] { print; found = 1; exit } END { exit !found }' "$1"
}

# wait_console CONSOLE SECONDS PATTERN [PID]: waits for a line that matches, and prints it without its time. Gives up
# when the guest has died or its kernel has.
wait_console() {
    local console=$1 end=$((SECONDS + $2)) pattern=$3 pid=${4:-}
    while :; do
        ! console_line "$console" "$pattern" || return 0
        ! grep -qE 'Kernel panic|Oops:|BUG: ' "$console" || { say "the guest's kernel died:"; grep -E -A 5 'Kernel panic|Oops:|BUG: ' "$console" | head -n 12 >&2; return 1; }
        [ -z "$pid" ] || alive "$pid" || { sleep 0.2; console_line "$console" "$pattern"; return; }
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
}

# last_acknowledged CONSOLE [BEFORE]: the highest record acknowledged on the console, up to the time BEFORE.
last_acknowledged() {
    awk -v before="${2:-9e18}" '$2 == "AFTERIMAGE-ACK" && NF == 3 && $3 ~ /^[0-9]+$/ && $1 + 0 <= before + 0 && $3 + 0 > n { n = $3 + 0 } END { print n + 0 }' "$1"
}

# check_field LINE NAME: the value of NAME= in a line of the machine's own check.
check_field() { sed -n "s/.* $2=\([^ ]*\).*/\1/p" <<<"$1"; }
