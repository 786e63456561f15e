# Builds the release once, and finds what was built.
source "$(dirname "${BASH_SOURCE[0]}")/bpf.sh"
build_dir=${AFTERIMAGE_BUILD:-$repository/.build}

# What Swift links the product with; qemu-utils, nbd and fio are for the tests and benchmarks.
build_packages=(liburing-dev libbpf-dev libaio-dev libnbd-dev liblz4-dev libzstd-dev zlib1g-dev libxxhash-dev libsqlite3-dev pkg-config git)
run_packages=(util-linux e2fsprogs python3 openssl curl)
test_packages=(qemu-utils libnbd-bin nbdkit fio xfsprogs fdisk)

# sudo hides the PATH of the person who called it, where Swift usually is.
find_swift() {
    local candidate home=
    [ -z "${SUDO_USER:-}" ] || home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    for candidate in "$(command -v swift || true)" /opt/swift/usr/bin/swift /usr/local/swift/usr/bin/swift \
        ${home:+"$home/.local/share/swiftly/bin/swift" "$home/.swiftly/bin/swift"} /usr/libexec/swift/bin/swift; do
        if [ -x "$candidate" ]; then swift=$candidate; return 0; fi
    done
    die "Swift is not installed, or not in the PATH: this needs Swift 6.2 or newer (https://www.swift.org/install/linux/)"
}

# as_owner COMMAND...: as the person who called sudo, if the repository is theirs, so that no file of root's is left in it.
as_owner() {
    if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ] && [ "$(stat -c %U "$repository")" = "$SUDO_USER" ]; then
        sudo -u "$SUDO_USER" -H --preserve-env=AFTERIMAGE_BUILD env PATH="$(dirname "$swift"):$PATH" "$@"
    else
        env PATH="$(dirname "$swift"):$PATH" "$@"
    fi
}

# build_release ARG...: swift build in release; ARGs go along. Its output is shown when it fails, its progress on a terminal.
# The compiler and the package manager leave things in their temporary directory, so they get one that is removed.
build_release() {
    find_swift
    build_bpf
    local scratch log status=0 command progress progress_pid
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/afterimage-build.XXXXXX")
    defer rm -rf "$scratch"
    log=$scratch/log
    chmod 755 "$scratch"
    mkdir -m 1777 "$scratch/t"
    command=(as_owner TMPDIR="$scratch/t" "$swift" build -c release --package-path "$repository" --scratch-path "$build_dir" "$@")
    if [ -t 2 ]; then
        # Not in a pipeline: a signal is to end the build, too.
        exec {progress}> >(tee "$log" | tr '\r' '\n' |
            awk '{
                percent = 0
                if (match($0, /^\[[0-9]+\/[0-9]+\]/)) { split(substr($0, 2, RLENGTH - 2), n, "/"); percent = 100 * n[1] / n[2] }
                bar = ""
                for (i = 0; i < 30; i++) bar = bar (i < percent * 0.3 ? "#" : ".")
                printf "\r\033[K   [%s] %3d%% %s", bar, percent, substr($0, 1, 60); fflush()
            } END { printf "\r\033[K" }' >&2)
        progress_pid=$!
        foreground "${command[@]}" >&"$progress" 2>&1 || status=$?
        exec {progress}>&-
        wait "$progress_pid" || true
    else
        foreground "${command[@]}" >"$log" 2>&1 || status=$?
    fi
    if [ "$status" != 0 ]; then
        grep -E 'error:' "$log" | sort -u | head -n 20 >&2 || true
        tail -n 15 "$log" >&2
        die "the build failed (its errors are above)"
    fi
    rm -rf "$scratch"
    afterimage=$build_dir/release/afterimage
}
