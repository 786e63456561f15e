# A guest that proves the live tap on its kernel: two disks of every kind that the kernel has a driver for, and `live-tap-holder check` on
# them. Every run is one test: its line of figures is part of its name.
source "$repository/tools/lib/guest.sh"
source "$repository/tools/lib/initramfs.sh"

live_tap_guest_packages=(cpio kmod xz-utils zstd e2fsprogs xfsprogs util-linux dmsetup sg3-utils)

# MiB of each disk.
live_tap_disk_mib=32

# find_live_tap_holder: sets $holder. tools/test has just built it; by hand it is built here.
find_live_tap_holder() {
    source "$repository/tools/lib/build.sh"
    if [ -z "${AFTERIMAGE:-}" ]; then
        build_release --product live-tap-holder
        AFTERIMAGE=$build_dir/release/afterimage
    fi
    holder=$(dirname "$AFTERIMAGE")/live-tap-holder
    [ -x "$holder" ] || die "there is no $holder: run tools/test without --no-build once"
}

# available WHAT COMMAND...: whether COMMAND can fetch WHAT; if not, a skip says why.
available() {
    local what=$1 log=$run_dir/fetch.log
    shift
    if (cleanup_owner=$BASHPID cleanup_stack=(); trap run_cleanup EXIT; "$@") >"$log" 2>&1; then return 0; fi
    skip "${tool_name%.sh}" "$what cannot be fetched: $(grep -v '^[EW]: Some index' "$log" | tail -n 2 | tr '\n' ' ')"
    return 1
}

# start_live_tap_guest KERNEL_DIR RUNS: boots the kernel with the disks and the text RUNS, which tools/machine/live-tap-init.sh follows. Sets
# $console and $guest_pid.
start_live_tap_guest() {
    local kernel=$1 runs=$2 dir root disk program arguments=()
    dir=$(mktemp -d "$run_dir/guest.XXXX")
    root=$dir/root console=$dir/console
    mkdir -p "$root/bin"
    put_modules "$root" "$kernel" "$dir/all" virtio_pci virtio_blk virtio_scsi sd_mod nvme loop ext4 xfs crc32c_generic dm_mod raid1 null_blk scsi_debug
    cp "$busybox" "$root/bin/busybox"
    put_program "$root" bin "$holder"
    for program in losetup mke2fs dmsetup sg_raw; do put_program "$root" sbin "$(command -v $program)"; done
    put_program "$root" sbin "$mdadm"
    install -m 755 "$repository/tools/machine/live-tap-init.sh" "$root/init"
    for program in discard-load stacked-load pass-through-load; do install -m 755 "$repository/tools/machine/$program.sh" "$root/$program"; done
    printf '%s\n' "$runs" >"$root/runs"
    pack_initramfs "$root" >"$dir/initrd"
    rm -rf "$root" "$dir/all"
    for disk in vda vdb vdd sda sdb nvme1 nvme2; do truncate -s "${live_tap_disk_mib}M" "$dir/$disk"; done
    truncate -s 304M "$dir/nvme3" # no XFS is smaller
    mkfs.xfs -q "$dir/nvme3"
    truncate -s "$((live_tap_disk_mib * 3 + 16))M" "$dir/loops"
    mke2fs -q -t ext4 -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 "$dir/loops"
    for disk in vda vdb vdd sda sdb nvme1 nvme2 nvme3 loops; do
        arguments+=(-drive "file=$dir/$disk,if=none,id=$disk,format=raw,cache=unsafe,discard=unmap")
    done
    # vda has two hardware queues, vdb one, behind a scheduler. vdd has room for five small writes though it gives out eight tags: its driver sends
    # some back, and they are issued again. NVMe: with paths (the default) the disk is not request-based, and cannot be followed.
    start_guest "$console" -smp 2 -m 1280 -kernel "$kernel/vmlinuz" -initrd "$dir/initrd" \
        -append "console=ttyS0 panic=-1 oops=panic quiet mitigations=off cryptomgr.notests nokaslr random.trust_cpu=on nosoftlockup nvme_core.multipath=N rdinit=/init" \
        "${arguments[@]}" -device virtio-blk-pci,drive=vda,num-queues=2 -device virtio-blk-pci,drive=vdb,num-queues=1 -device virtio-blk-pci,drive=loops \
        -device virtio-blk-pci,drive=vdd,num-queues=1,queue-size=16,indirect_desc=off \
        -device virtio-scsi-pci,id=scsi -device scsi-hd,drive=sda,bus=scsi.0 -device scsi-hd,drive=sdb,bus=scsi.0 \
        -device nvme,serial=afterimage,id=nvme -device nvme-ns,drive=nvme1,bus=nvme -device nvme-ns,drive=nvme2,bus=nvme -device nvme-ns,drive=nvme3,bus=nvme
}

# live_tap_run NAME SECONDS: waits for the end of the run NAME, and sets $output to what it said. (No command substitution around the wait:
# a signal is answered at once.)
live_tap_run() {
    wait_console "$console" "$2" "^LIVE-TAP-END $1 " "$guest_pid" >/dev/null || return 1
    output=$(sed 's/^[0-9.]* //; s/\r$//' "$console" |
        awk -v name="$1" '$1 == "LIVE-TAP-RUN" { on = $2 == name; next } $1 == "LIVE-TAP-END" { if (on) print; on = 0 } on')
}

# live_tap_kernel KERNEL_DIR SECONDS PAUSE KIND...: boots the kernel and runs the checks, each for SECONDS, its 32 chains pausing for PAUSE µs after each
# write. KIND: virtio-blk, scsi, nvme, loop, mixed (one disk of each in one group), requeue (a driver that sends requests back), ranges
# (XFS that discards several ranges with one request), stacked (disks under device-mapper and under md: what is on top is refused), pass-through (SCSI commands that
# write, and that the kernel does not account for), many-tags (a disk that takes 16,384 requests at once), busy-host (SCSI sends requests back before they are issued), drops (events dropped on purpose), mutants, btf.
live_tap_kernel() {
    local kernel=$1 seconds=$2 pause=$3 version runs kind name output
    shift 3
    version=$(cat "$kernel/version")
    runs="wait_for /dev/vda /dev/vdb /dev/vdd /dev/sda /dev/sdb /dev/nvme0n1 /dev/nvme0n2 /dev/nvme0n3 && loops /dev/vdc $live_tap_disk_mib /dev/loop0 /dev/loop1"
    for kind; do runs+=$'\n'$(live_tap_kind "$kind" "$seconds" "$pause"); done
    start_live_tap_guest "$kernel" "$runs"
    wait_console "$console" 120 '^LIVE-TAP-KERNEL .* btf=yes' "$guest_pid" >/dev/null ||
        { not_ok "$version boots and has BTF" "$(tail -n 3 "$console" | tr '\n' ' ')"; stop_process "$guest_pid"; return; }
    for kind; do
        for name in $(live_tap_kind "$kind" "$seconds" "$pause" | awk '$1 == "run" { print $2 }'); do
            live_tap_run "$name" $((seconds * 10 + 300)) || { not_ok "$version, $name" "the guest did not get there: $(tail -n 3 "$console" | tr '\n' ' ')"; break 2; }
            live_tap_verdict "$version" "$name" "$output"
        done
    done
    wait_console "$console" 60 '^LIVE-TAP-DONE' "$guest_pid" >/dev/null && until_true 20 process_gone "$guest_pid" || not_ok "$version ends" "$(tail -n 3 "$console" | tr '\n' ' ')"
    stop_process "$guest_pid"
}

# live_tap_kind KIND SECONDS PAUSE: its lines of /runs.
live_tap_kind() {
    local options="--seconds $2 --pause $3 --chains 32 --discards 5" short="--seconds $(($2 / 3 + 5)) --pause $3 --chains 32 --discards 5" virtio="--disk /dev/vda --disk /dev/vdb"
    case $1 in
    virtio-blk) echo "run virtio-blk $virtio $options" ;;
    scsi) echo "run scsi --disk /dev/sda --disk /dev/sdb $options" ;;
    nvme) echo "run nvme --disk \$(namespace 1) --disk \$(namespace 2) $options" ;;
    loop) echo "run loop --disk /dev/loop0 --disk /dev/loop1 $options" ;;
    mixed) echo "run mixed --disk /dev/vda --disk /dev/sda --disk \$(namespace 1) --disk /dev/loop0 $options" ;;
    requeue) echo "run requeue --disk /dev/vdd $options" ;;
    ranges) echo "run many-ranges --disk \$(namespace 3) --load \"/bin/sh /discard-load \$(namespace 3) $(($2 / 4 + 2))\"" ;;
    stacked)
        echo "linear volume /dev/vda /dev/vdb"
        echo "run refused-mapped --disk /dev/mapper/volume"
        echo "run under-mapped $virtio --load \"/bin/sh /stacked-load /dev/mapper/volume $2 && /sbin/dmsetup remove volume\""
        echo "raid1 /dev/md0 /dev/sda /dev/sdb"
        echo "run refused-raid --disk /dev/md0"
        echo "run under-raid --disk /dev/sda --disk /dev/sdb --load \"/bin/sh /stacked-load /dev/md0 $2 /dev/sdb && /sbin/mdadm --quiet --stop /dev/md0\""
        ;;
    many-tags)
        echo "null_disk 2 8192"
        echo "run many-tags --disk /dev/nullb0 $options"
        ;;
    busy-host)
        echo "busy_scsi_disk"
        echo "run busy-host --disk \$busy_scsi_disk $options"
        # Hardly anything else is in flight while a request waits to be issued again.
        [ "$2" -lt 50 ] || echo "run busy-host-alone --disk \$busy_scsi_disk $short --chains 2"
        ;;
    pass-through) echo "run pass-through --disk /dev/sda --expect resync --load \"/bin/sh /pass-through-load /dev/sda\"" ;;
    drops)
        echo "run dropped-completions $virtio $short --drop completions"
        echo "run dropped-issues $virtio $short --drop issues"
        echo "run dropped-both $virtio $short --drop both"
        ;;
    mutants)
        # Without a pause, so that blocks are written again before they are read on a fast machine, too.
        echo "run mutant-without-collision-check $virtio $short --pause 0 --fault skip-collision-check"
        echo "run mutant-that-believes-its-program $virtio $short --drop issues --fault skip-reconciliation"
        ;;
    btf)
        echo hide_btf
        echo "run without-btf --disk /dev/vda $short"
        ;;
    *) die "no such kind of check: $1" ;;
    esac
}

# live_tap_verdict KERNEL NAME OUTPUT
live_tap_verdict() {
    local kernel=$1 name=$2 output=$3 line
    line=$(grep '^live-tap-check' <<<"$output" | tail -n 1) || true
    case $name in
    mutant-*)
        if [ "$(check_field "$line" violations)" -gt 0 ] 2>/dev/null; then ok "$kernel, $name is caught (point $(check_field "$line" proven))"; else not_ok "$kernel, $name is caught" "$line"; fi
        ;;
    refused-*)
        if grep -qE '^refused-mapped .*device-mapper.*underneath: /dev/vda, /dev/vdb\)|^refused-raid .*RAID.*underneath: /dev/sda, /dev/sdb\)' <<<"$name $line"; then
            ok "$kernel, $name: it says why, and what to follow"
        else
            not_ok "$kernel, $name: it says why, and what to follow" "$(tail -n 3 <<<"$output" | tr '\n' ' ')"
        fi
        ;;
    without-btf)
        if grep -qi 'BTF' <<<"$line" && ! grep -q 'verdict=' <<<"$line"; then ok "$kernel, without BTF it refuses and says why"; else not_ok "$kernel, without BTF it refuses and says why" "$line"; fi
        ;;
    *)
        if [[ $line == *" verdict=ok" ]] && grep -q '^LIVE-TAP-END .* status=0$' <<<"$output"; then
            [ "$name" != many-ranges ] || [[ $line =~ discards=[0-9]+\+[1-9] ]] || { not_ok "$kernel, $name" "no request had several ranges: $line"; return; }
            ok "$kernel, $name: every proven point is exact ($(sed 's/^live-tap-check kernel=[^ ]* //; s/ verdict=ok$//' <<<"$line"))"
        else
            not_ok "$kernel, $name: every proven point is exact" "$(tail -n 8 <<<"$output" | tr '\n' ' ')"
        fi
        ;;
    esac
}
