# The disk of a whole Debian of the release that runs here: systemd, udev, Debian's cloud kernel with the initramfs that Debian makes for it, an ext4
# root file system, GRUB, the guest agent; for a BIOS, and for UEFI. Needs root, as installing packages does. What is the same for all comes out of the
# cache; each run opens a copy of its own and puts its files in.
#
# On disk: MBR with GRUB's boot sector | GRUB's core image in the gap | ext4, all of Debian
#      or: GPT | EFI system partition with GRUB where every firmware looks for it | ext4, all of Debian

debian_disk_packages=(mmdebstrap grub-common grub-pc-bin grub-efi-amd64-bin e2fsprogs fdisk util-linux dosfstools mtools)
debian_disk_mib=1536
debian_efi_mib=64
debian_disk_offset=$((1 << 20)) # of the root file system
debian_root_uuid=41464954-0000-4000-8000-000000000011

# fetch_debian_disk [bios|uefi]: sets $debian_disk, an image nobody writes to.
fetch_debian_disk() {
    local name firmware=${1:-bios}
    debian_disk_offset=$((1 << 20))
    require_debian "a Debian of its own, by mmdebstrap"
    name=debian-$(os_release VERSION_CODENAME)-$({ declare -f build_debian_disk make_debian_root; declare -p debian_disk_mib debian_efi_mib debian_root_uuid; mke2fs -V 2>&1; grub-mkimage --version; } | sha256sum | cut -c1-16)
    with_cache_lock debian-disk build_debian_disk "$name"
    debian_disk=$cache_dir/$name-$firmware.img
    [ "$firmware" = bios ] || debian_disk_offset=$(((debian_efi_mib + 1) << 20))
}

# The program's libraries that are Debian's own come as packages, as on any server. apt's timers stay away from the network.
build_debian_disk() {
    [ ! -f "$cache_dir/$1-bios.img" ] || [ ! -f "$cache_dir/$1-uefi.img" ] || return 0
    local suite mirror log image root started
    suite=$(os_release VERSION_CODENAME)
    mirror=$(debian_mirror)
    say "building a disk with Debian $suite"
    started=$(now)
    staging_dir
    log=$staged/log image=$staged/image root=$staged/root
    foreground mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
        --include=systemd-sysv,udev,dbus,kmod,iproute2,e2fsprogs,initramfs-tools,zstd,linux-image-cloud-amd64 \
        --include=libbpf1,liburing2,liblz4-1,libzstd1,libxxhash0,libsqlite3-0,libstdc++6,qemu-guest-agent,python3 \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='echo primary >"$1/etc/hostname"' \
        --customize-hook="echo 'UUID=$debian_root_uuid / ext4 errors=remount-ro 0 1' >\"\$1/etc/fstab\"" \
        --customize-hook='printf "127.0.0.1 localhost\n127.0.1.1 primary\n" >"$1/etc/hosts"; : >"$1/etc/machine-id"; : >"$1/etc/resolv.conf"' \
        --customize-hook='printf "[Match]\nName=e*\n[Network]\nDHCP=ipv4\n" >"$1/etc/systemd/network/cable.network"' \
        --customize-hook='chroot "$1" systemctl --quiet enable systemd-networkd' \
        --customize-hook='chroot "$1" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer systemd-networkd-wait-online.service' \
        "$suite" "$root" "$mirror" >"$log" 2>&1 || { tail -n 8 "$log" >&2; die "mmdebstrap cannot install Debian $suite"; }

    # As grub-install leaves it: modules and configuration in /boot/grub, the core image behind the boot sector.
    mkdir -p "$root/boot/grub/i386-pc"
    cp /usr/lib/grub/i386-pc/*.{mod,lst} "$root/boot/grub/i386-pc/"
    # The rest of the command line lets it boot quickly under emulation, and die at once instead of hanging when the kernel panics.
    cat >"$root/boot/grub/grub.cfg" <<GRUB
search --no-floppy --fs-uuid --set=root $debian_root_uuid
linux /vmlinuz root=UUID=$debian_root_uuid ro quiet console=ttyS0 panic=-1 oops=panic mitigations=off cryptomgr.notests nokaslr
initrd /initrd.img
boot
GRUB
    grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o "$staged/core.img" biosdisk part_msdos ext2
    [ "$(stat -c %s "$staged/core.img")" -lt $((2047 * 512)) ] || die "GRUB's core image does not fit before the first partition"

    truncate -s "${debian_disk_mib}M" "$image"
    sfdisk -q "$image" >>"$log" 2>&1 <<<$'label: dos\nlabel-id: 0x41464955\nstart=2048, type=83, bootable' || { tail -n 5 "$log" >&2; die "cannot partition the image"; }
    dd if=/usr/lib/grub/i386-pc/boot.img of="$image" bs=440 count=1 conv=notrunc status=none
    dd if="$staged/core.img" of="$image" bs=512 seek=1 conv=notrunc status=none
    make_debian_root "$image" "$((1 << 20))"
    chmod 444 "$image"
    publish "$image" "$1-bios.img"

    # What is embedded finds the root file system and its menu by itself.
    printf '%s\n' "search --no-floppy --fs-uuid --set=root $debian_root_uuid" 'configfile /boot/grub/grub.cfg' >"$staged/efi.cfg"
    grub-mkimage -O x86_64-efi -c "$staged/efi.cfg" -p /boot/grub -o "$staged/BOOTX64.EFI" part_gpt ext2 search search_fs_uuid configfile linux boot
    truncate -s "${debian_efi_mib}M" "$staged/efi"
    mkfs.vfat -F 32 -s 1 "$staged/efi" >>"$log" 2>&1 && mmd -i "$staged/efi" ::EFI ::EFI/BOOT && mcopy -i "$staged/efi" "$staged/BOOTX64.EFI" ::EFI/BOOT/ ||
        { tail -n 5 "$log" >&2; die "cannot make the EFI system partition"; }
    truncate -s "$((debian_disk_mib + debian_efi_mib + 1))M" "$image"
    sfdisk -q "$image" >>"$log" 2>&1 <<<"label: gpt
start=2048, size=${debian_efi_mib}MiB, type=U
start=$((debian_efi_mib + 1))MiB, size=$((debian_disk_mib - 1))MiB, type=L" || { tail -n 5 "$log" >&2; die "cannot partition the image"; }
    dd if="$staged/efi" of="$image" bs=1M seek=1 conv=notrunc,sparse status=none
    make_debian_root "$image" "$(((debian_efi_mib + 1) << 20))"
    chmod 444 "$image"
    publish "$image" "$1-uefi.img"
    find "$cache_dir" -maxdepth 1 -name 'debian-*.img' -mtime +7 -delete # of earlier inputs
    rm -rf "$staged"
    say "built in $(since "$started") s: $cache_dir/$1-bios.img, $1-uefi.img"
}
# make_debian_root IMAGE OFFSET: $root as an ext4 file system in IMAGE
make_debian_root() {
    mke2fs -q -t ext4 -d "$root" -U "$debian_root_uuid" -E "offset=$2,lazy_itable_init=0,lazy_journal_init=0" "$1" "$((debian_disk_mib - 1))M" \
        >>"$log" 2>&1 || { tail -n 5 "$log" >&2; die "cannot make the root file system"; }
}

# open_debian_disk IMAGE: mounts its root file system on $debian_root. Close it before it is booted.
open_debian_disk() {
    debian_root=$run_dir/root
    mkdir -p "$debian_root"
    debian_loop=$(losetup --find --show --offset "$debian_disk_offset" "$1")
    mount "$debian_loop" "$debian_root"
}
close_debian_disk() {
    umount "$debian_root"
    losetup -d "$debian_loop"
}

# put_release ROOT FILE...: programs of this build into /usr/local/bin, without debugging symbols, and beside them, where they look for them, the
# libraries that are not the system's: Swift's.
put_release() {
    local target=$1/usr/local/bin library
    shift
    install -m 755 -s -t "$target" "$@"
    for library in $(ldd "$@" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | sort -u); do
        case $library in
        /lib/* | /lib64/* | /usr/lib/*) ;;
        *) install -m 644 -t "$target" "$library" ;;
        esac
    done
}
