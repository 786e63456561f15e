#!/usr/bin/env bash
# alone
# tier: guest
# limit: 3600
# guest-live-tap.sh [--seconds N] [--pause µS] [--suite SUITE]... [KIND...]: the live tap on the kernels of Debian, in guests: dependent writes to
# virtio-blk, SCSI, NVMe and loop disks, to a group with one of each, and to disks under device-mapper and md. Every proven point is exact, also while
# the kernel's events are dropped on purpose; what is written past the block layer is noticed, and so are deliberate mistakes; without BTF, and on top of
# device-mapper or md, it refuses. SUITE: bookworm (6.1) and the newest for this Debian when not said.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/live-tap-guest.sh"

seconds=50 pause=15000 suites=() kinds=()
while [ $# -gt 0 ]; do
    case $1 in
    --seconds) seconds=$2; shift 2 ;;
    --pause) pause=$2; shift 2 ;;
    --suite) suites+=("$2"); shift 2 ;;
    -h | --help) sed -n '5,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) die "unknown argument $1 (see --help)" ;;
    *) kinds+=("$1"); shift ;;
    esac
done
[ ${#suites[@]} -gt 0 ] || suites=(bookworm "")
[ ${#kinds[@]} -gt 0 ] || kinds=(virtio-blk scsi nvme loop mixed requeue ranges many-tags busy-host stacked pass-through drops mutants btf)
make_run_dir
need_packages "${live_tap_guest_packages[@]}"
find_live_tap_holder
available "QEMU 10" fetch_qemu10 || finish
available "a static busybox" fetch_busybox || finish
available mdadm fetch_mdadm || finish
fetch_qemu10
fetch_busybox
fetch_mdadm
for suite in "${suites[@]}"; do
    available "Debian's kernel (${suite:-newest})" fetch_kernel $suite || continue
    fetch_kernel $suite
    live_tap_kernel "$kernel_dir" "$seconds" "$pause" "${kinds[@]}"
done
finish
