#!/usr/bin/env bash
# alone
# limit: 420
# Databases that commit all the time on a mounted file system, followed by the live tap: every recovery point is opened as after a power
# cut, and has every transaction that was committed before its cut. SQLite (WAL) on ext4 and on XFS; PostgreSQL when it is installed.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product live-database
[ -e /sys/kernel/btf/vmlinux ] || { skip live-database "this kernel does not describe its types"; finish; }
make_run_dir
agent_tap=live

# protect_mounted FS MIB: a loop device with a mounted FS, followed; $mounted and $loop_device.
protect_mounted() {
    disk_file=$run_dir/disk.img mounted=$run_dir/mounted
    truncate -s "$2M" "$disk_file"
    attach_loop "$disk_file"
    case $1 in ext4) mkfs.ext4 -q "$loop_device" ;; xfs) mkfs.xfs -q "$loop_device" ;; esac
    mkdir -p "$mounted"
    mount "$loop_device" "$mounted"
    product_setup
    start_appliance
    start_agent "$loop_device"
    enrol s
    "$afterimage" replication start s --epoch-ms 500 --policy all:1h --wait </dev/null >/dev/null
}
end_mounted() {
    kill_now "$agent_pid" "$appliance_pid" || true
    "$afterimage" agent detach --state "$primary_state" </dev/null >/dev/null
    umount "$mounted"
    losetup -d "$loop_device"
    rm -rf "$primary_state" "$secondary_state" "$sockets" "$disk_file"
}

# opened FS POINT COMMAND...: the point's copy, mounted so that the journal is replayed, in $copy while COMMAND runs; then checked.
opened() {
    local fs=$1 point=$2 status=0 device
    shift 2
    copy=$run_dir/copy
    mkdir -p "$copy"
    "$afterimage" recovery-point export s "$point" --to raw --output "$run_dir/copy.img" --wait </dev/null >/dev/null || return 1
    device=$(losetup --find --show "$run_dir/copy.img")
    if [ "$fs" = xfs ]; then mount -o nouuid "$device" "$copy" || status=1; else mount "$device" "$copy" || status=1; fi
    if [ "$status" = 0 ]; then
        "$@" || status=1
        umount "$copy" || status=1
        case $fs in ext4) e2fsck -fn "$device" >/dev/null 2>&1 || status=1 ;; xfs) xfs_repair -n "$device" >/dev/null 2>&1 || status=1 ;; esac
    fi
    losetup -d "$device"
    rm -f "$run_dir/copy.img"
    return "$status"
}

# committed_before TIME LOG: the newest number that was committed before.
committed_before() { awk -v t="$1" '$2 + 0 < t + 0 { n = $1 } END { print n + 0 }' "$2"; }

# every_point NAME FS LOG ASK: each point cut since the first line of LOG; `ASK NUMBER` must find that transaction, and all before it.
every_point() {
    local name=$1 fs=$2 log=$3 ask=$4 begin point time count=0 bad=0 wanted
    begin=$(head -n 1 "$log" | cut -d' ' -f2)
    while read -r point time; do
        awk -v a="$time" -v b="$begin" 'BEGIN { exit !(a + 0 > b + 0) }' || continue
        wanted=$(committed_before "$time" "$log")
        count=$((count + 1))
        opened "$fs" "$point" "$ask" "$wanted" >"$run_dir/ask.log" 2>&1 || { bad=$((bad + 1)); say "point $point, $wanted wanted: $(tail -n 2 "$run_dir/ask.log")"; }
    done < <(points s)
    if [ "$bad" = 0 ] && [ "$count" -ge "${5:-10}" ]; then
        ok "$name: all of $count points open, with every transaction before their cut ($(wc -l <"$log") committed)"
    else
        not_ok "$name" "$bad of $count points (at least ${5:-10} wanted)"
    fi
}

sqlite_has() { python3 "$repository/tools/lib/transactions.py" check "$copy/shop.db" "$1"; }
sqlite() {
    local fs=$1
    protect_mounted "$fs" "$2"
    python3 "$repository/tools/lib/transactions.py" write "$mounted/shop.db" 10 >"$run_dir/commits-$fs" || { not_ok "SQLite on $fs" "its writer failed"; return; }
    every_point "SQLite on $fs" "$fs" "$run_dir/commits-$fs" sqlite_has
    end_mounted
}

postgres_bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -n 1)
as_postgres() { setpriv --reuid postgres --regid postgres --init-groups --reset-env "$@"; }
postgres() { # COMMAND DIRECTORY
    as_postgres "$postgres_bin/pg_ctl" -D "$2" -w -t 60 -l "$2/log" -o "-c listen_addresses='' -c unix_socket_directories='$2'" "$1" </dev/null >/dev/null 2>&1
}
postgres_has() {
    local found
    # As after a boot: no process of the primary site is alive here.
    rm -f "$copy/pg/postmaster.pid" "$copy"/pg/.s.PGSQL*
    postgres start "$copy/pg" || { tail -n 5 "$copy/pg/log"; return 1; }
    found=$(as_postgres "$postgres_bin/psql" -h "$copy/pg" -d postgres -Atc "select count(*) filter (where n <= $1) = $1 and count(*) = max(n) from t" </dev/null) || found=error
    postgres stop "$copy/pg" || true
    [ "$found" = t ] || [ "$1" = 0 ] || { echo "it says $found"; return 1; }
}
postgresql() {
    protect_mounted ext4 320
    mkdir "$mounted/pg"
    chown postgres "$mounted/pg"
    # Its files are below directories of runs, which are closed to others.
    local directory=$run_dir
    while [[ $directory == */afterimage-* ]]; do
        chmod o+x "$directory"
        directory=$(dirname "$directory")
    done
    as_postgres "$postgres_bin/initdb" -D "$mounted/pg" --no-instructions </dev/null >/dev/null || { not_ok "PostgreSQL" "initdb failed"; return; }
    postgres start "$mounted/pg" || { not_ok "PostgreSQL" "$(tail -n 3 "$mounted/pg/log")"; return; }
    as_postgres "$postgres_bin/psql" -h "$mounted/pg" -d postgres -qc "create table t (n int primary key, filler text)" </dev/null
    # psql's \\! runs after the commit was acknowledged.
    for number in $(seq 4000); do
        printf "insert into t values (%d, repeat('x', 500));\n\\\\! date '+%d %%s.%%N'\n" "$number" "$number"
    done >"$run_dir/inserts.sql"
    foreground timeout 8 setpriv --reuid postgres --regid postgres --init-groups "$postgres_bin/psql" -h "$mounted/pg" -d postgres -qAt -f "$run_dir/inserts.sql" \
        >"$run_dir/commits" || true
    sed -i '$d' "$run_dir/commits" # the last line may not be whole
    every_point "PostgreSQL" ext4 "$run_dir/commits" postgres_has 5
    postgres stop "$mounted/pg"
    end_mounted
}

sqlite ext4 48
sqlite xfs 320
if [ -n "$postgres_bin" ] && id postgres >/dev/null 2>&1; then postgresql; else skip PostgreSQL "it is not installed (Debian's package postgresql)"; fi
finish
