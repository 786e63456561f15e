#!/usr/bin/env bash
# Compiles the kernel's half of the live tap for BPF and writes it as a C header that CLiveTap embeds, so that the product stays one
# file that runs from anywhere. The header is generated, not committed; a build without it runs, but has no live tap.
#
# build_bpf: writes the header if the program's source is newer. Uses the clang of the Swift toolchain (it has the bpf target), or the
# system's.
build_bpf() {
    local source=$repository/Sources/CLiveTap/live-tap.bpf.c header=$repository/Sources/CLiveTap/live-tap-program.h
    local abi=$repository/Sources/CLiveTap/include/clivetap_abi.h candidate clang= object architecture machine
    if [ -f "$header" ] && [ "$header" -nt "$source" ] && [ "$header" -nt "$abi" ]; then return 0; fi
    for candidate in "$(dirname "${swift:-/none}")/clang" "$(command -v clang || true)"; do
        if [ -x "$candidate" ] && "$candidate" -print-targets 2>/dev/null | grep -q '^ *bpf '; then clang=$candidate; break; fi
    done
    [ -n "$clang" ] || die "no clang with the bpf target: Swift's toolchain has one beside the swift program, Debian's is in the package clang"
    machine=$(uname -m)
    case $machine in x86_64) architecture=x86 ;; aarch64) architecture=arm64 ;; *) architecture=$machine ;; esac
    object=$(mktemp "${TMPDIR:-/tmp}/afterimage-bpf.XXXXXX")
    "$clang" -O2 -g -target bpf -mcpu=v3 -D__TARGET_ARCH_$architecture -I"/usr/include/$machine-linux-gnu" -Wall -Werror -c "$source" -o "$object" ||
        { rm -f "$object"; die "the live tap's program does not compile (libbpf-dev is needed)"; }
    od -An -v -tx1 "$object" | sed 's/ \(..\)/0x\1,/g' >"$header.new"
    rm -f "$object"
    [ "$(id -u)" != 0 ] || chown --reference="$source" "$header.new"
    mv "$header.new" "$header"
    touch "$repository/Sources/CLiveTap/clivetap.c" # a build without the header does not know that it depends on it
}

# Run by hand, before a plain `swift build`.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    source "$(dirname "$(readlink -f "$0")")/common.sh"
    source "$repository/tools/lib/build.sh"
    find_swift
    build_bpf
fi
