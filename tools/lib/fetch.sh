# What the guests need and the system may not have: QEMU 10, a Debian cloud kernel, a static busybox, mdadm. Kept in the cache
# ($AFTERIMAGE_CACHE, else /var/cache/afterimage); built in a temporary directory, published by rename under a lock.

# with_cache_lock NAME COMMAND...: one process at a time builds NAME. The lock ends with this process at the latest.
with_cache_lock() {
    local locked=$1 status=0
    shift
    mkdir -p "$cache_dir" 2>/dev/null && [ -w "$cache_dir" ] ||
        die "cannot write to the cache $cache_dir: run as root once, or set AFTERIMAGE_CACHE to a directory of yours"
    exec {cache_lock}>"$cache_dir/.$locked.lock"
    flock "$cache_lock"
    "$@" || status=$?
    exec {cache_lock}>&-
    return "$status"
}

# publish STAGED NAME: the staged directory or file becomes $cache_dir/NAME.
publish() {
    local old
    if [ -e "$cache_dir/$2" ]; then
        old=$(mktemp -d "$cache_dir/.old.XXXXXX")
        mv "$cache_dir/$2" "$old/"
        mv "$1" "$cache_dir/$2"
        rm -rf "$old"
    else
        mv "$1" "$cache_dir/$2"
    fi
}

staging_dir() { staged=$(mktemp -d "$cache_dir/.staged.XXXXXX"); chmod 755 "$staged"; defer rm -rf "$staged"; }

# --- QEMU ------------------------------------------------------------------------------------------------------------
qemu_major() { "$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p'; }
qemu_new_enough() { [ "$(qemu_major "$1" || true)" -ge 10 ] 2>/dev/null; }

# fetch_qemu10: sets and exports AFTERIMAGE_QEMU, a qemu-system-x86_64 of version 10 or newer. Older ones compute
# cmpxchg16b's flags wrongly under TCG and crash their guests now and then (Debian 12 has 7.2).
fetch_qemu10() {
    if [ -n "${AFTERIMAGE_QEMU:-}" ]; then
        qemu_new_enough "$AFTERIMAGE_QEMU" || die "AFTERIMAGE_QEMU=$AFTERIMAGE_QEMU is no QEMU of version 10 or newer"
    elif qemu_new_enough "$(command -v qemu-system-x86_64 || true)"; then
        AFTERIMAGE_QEMU=$(command -v qemu-system-x86_64)
    else
        with_cache_lock qemu build_qemu
        AFTERIMAGE_QEMU=$cache_dir/qemu/bin/qemu-system-x86_64
    fi
    export AFTERIMAGE_QEMU
}

build_qemu() {
    ! qemu_new_enough "$cache_dir/qemu/bin/qemu-system-x86_64" || return 0
    local suite wanted
    suite=$(os_release VERSION_CODENAME)
    [ "$(os_release VERSION_ID)" != 12 ] || suite=$suite-backports
    say "fetching QEMU from Debian's $suite into $cache_dir/qemu (the system stays as it is)"
    staging_dir
    private_apt "$staged/apt" "$suite"
    wanted=(qemu-system-x86/"$suite" qemu-system-common/"$suite" qemu-system-data/"$suite" seabios/"$suite" ipxe-qemu)
    apt-get "${private[@]}" install -y --download-only --reinstall --no-install-recommends "${wanted[@]}" >"$staged/apt/log" 2>&1 ||
        { tail -n 8 "$staged/apt/log" >&2; die "cannot download QEMU from $suite"; }
    unpack_downloads "$staged/apt" "$staged/root"
    mkdir "$staged/bin"
    cat >"$staged/bin/qemu-system-x86_64" <<'WRAPPER'
#!/bin/sh
# Debian's QEMU, unpacked beside the system's packages.
root=$(dirname "$(dirname "$(readlink -f "$0")")")/root
LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" \
    -L /usr/share/qemu -L /usr/share/seabios -L /usr/lib/ipxe/qemu "$@"
WRAPPER
    chmod 755 "$staged/bin/qemu-system-x86_64"
    rm -rf "$staged/apt" "$staged/root/usr/share/doc" "$staged/root/usr/share/man"
    qemu_new_enough "$staged/bin/qemu-system-x86_64" ||
        { ldd "$staged/root/usr/bin/qemu-system-x86_64" | grep 'not found' >&2 || true; die "the QEMU of $suite does not run here"; }
    publish "$staged" qemu
}

# --- kernel, busybox and mdadm ---------------------------------------------------------------------------------------
# fetch_kernel [SUITE]: sets $kernel_dir, which holds vmlinuz, version and modules/VERSION (a Debian cloud kernel). Without SUITE
# the newest for this Debian.
fetch_kernel() {
    local newest name=kernel
    newest=$(os_release VERSION_CODENAME)
    [ "$(os_release VERSION_ID)" != 12 ] || newest=$newest-backports
    [ "${1:-$newest}" = "$newest" ] || name=kernel-$1
    with_cache_lock "$name" build_kernel "${1:-$newest}" "$name"
    kernel_dir=$cache_dir/$name
}

build_kernel() {
    local suite=$1 name=$2 package version
    [ ! -f "$cache_dir/$name/version" ] || return 0
    say "fetching the cloud kernel of Debian's $suite into $cache_dir/$name"
    staging_dir
    private_apt "$staged/apt" "$suite"
    package=$(apt-cache "${private[@]}" -t "$suite" depends linux-image-cloud-amd64/"$suite" 2>/dev/null |
        awk '/Depends: linux-image-[0-9]/ { print $2; exit }')
    [ -n "$package" ] || die "$suite has no linux-image-cloud-amd64"
    (cd "$staged/apt" && apt-get "${private[@]}" download "$package" >log 2>&1) || { tail -n 5 "$staged/apt/log" >&2; die "cannot download $package"; }
    unpack_downloads "$staged/apt" "$staged/root"
    version=$(basename "$staged"/root/boot/vmlinuz-* | sed 's/^vmlinuz-//')
    mv "$staged/root/boot/vmlinuz-$version" "$staged/vmlinuz"
    mkdir "$staged/modules"
    mv "$(find "$staged/root" -type d -path "*/lib/modules/$version" | head -n 1)" "$staged/modules/$version"
    rm -rf "$staged/apt" "$staged/root"
    echo "$version" >"$staged/version"
    publish "$staged" "$name"
}

# fetch_busybox: sets $busybox, a statically linked one.
fetch_busybox() {
    busybox=$(command -v busybox || true)
    [ -z "$busybox" ] || ldd "$busybox" >/dev/null 2>&1 || return 0
    with_cache_lock busybox build_program busybox busybox-static
    busybox=$cache_dir/busybox/busybox
}

# fetch_mdadm: sets $mdadm. (Installed, it would have the system look for arrays when it boots.)
fetch_mdadm() {
    mdadm=$(command -v mdadm || true)
    [ -z "$mdadm" ] || return 0
    with_cache_lock mdadm build_program mdadm mdadm
    mdadm=$cache_dir/mdadm/mdadm
}

# build_program NAME PACKAGE
build_program() {
    [ ! -x "$cache_dir/$1/$1" ] || return 0
    say "fetching $2 into $cache_dir/$1"
    staging_dir
    private_apt "$staged/apt" "$(os_release VERSION_CODENAME)"
    (cd "$staged/apt" && apt-get "${private[@]}" download "$2" >log 2>&1) || { tail -n 5 "$staged/apt/log" >&2; die "cannot download $2"; }
    unpack_downloads "$staged/apt" "$staged/root"
    mv "$(find "$staged/root" -type f -path "*bin/$1" | head -n 1)" "$staged/$1"
    rm -rf "$staged/apt" "$staged/root"
    publish "$staged" "$1"
}
