# What goes into the initramfs of a guest: modules of a Debian kernel, and programs with the libraries they are linked with.

# put_modules ROOT KERNEL_DIR SCRATCH MODULE...: modules with what they need, unpacked (busybox's modprobe reads neither xz nor zstd). A
# module that is built in, or that this kernel does not have, is passed over.
put_modules() {
    local target=$1 kernel=$2 all=$3 version plain module file
    shift 3
    version=$(cat "$kernel/version")
    plain=$target/lib/modules/$version
    mkdir -p "$all/lib/modules" "$plain"
    cp -rs "$kernel/modules/$version" "$all/lib/modules/"
    depmod -b "$all" "$version"
    for module; do
        modprobe -d "$all" -S "$version" --show-depends "$module" 2>/dev/null | awk '$1 == "insmod" { print $2 }' || true
    done | sort -u | while read -r file; do
        case $file in
        *.xz) xz -dc "$file" >"$plain/$(basename "$file" .xz)" ;;
        *.zst) zstd -qdc "$file" >"$plain/$(basename "$file" .zst)" ;;
        *) cat "$file" >"$plain/$(basename "$file")" ;;
        esac
    done
    cp "$kernel/modules/$version"/modules.{builtin,builtin.modinfo,order} "$plain/"
    depmod -b "$target" "$version"
    find "$plain" -type f ! -name '*.ko' ! -name modules.dep -delete
}

# put_program ROOT DIRECTORY FILE: into DIRECTORY of ROOT; its libraries into lib and lib64.
put_program() {
    local target=$1 directory=$2 program=$3 library
    mkdir -p "$target/$directory" "$target/lib" "$target/lib64"
    cp -L "$program" "$target/$directory/"
    for library in $(ldd "$program" | grep -o '/[^ ]*' | sort -u); do
        case $library in
        /lib64/*) cp -L "$library" "$target/lib64/" ;;
        *) cp -L "$library" "$target/lib/" ;;
        esac
    done
}

# pack_initramfs ROOT: writes it to standard output; the same files give the same bytes.
pack_initramfs() { (cd "$1" && find . -print0 | sort -z | cpio --null -o -H newc --quiet --reproducible -R 0:0); }
