# Python programs that tests ask, from PyPI, in a virtual environment of their own in the cache.

# need_python NAME PACKAGE==VERSION...: sets $python_dir, whose bin has them.
need_python() {
    local name
    name=python-$1-$(printf '%s\n' "$@" | sha256sum | cut -c1-12)
    [ -f "$cache_dir/$name/complete" ] || with_cache_lock "$name" build_python "$name" "${@:2}"
    python_dir=$cache_dir/$name
}

# Made in its place: an environment cannot be moved. It counts once it is complete.
build_python() {
    local dir=$cache_dir/$1
    [ ! -f "$dir/complete" ] || return 0
    python3 -c 'import ensurepip' 2>/dev/null || need_packages python3-venv
    say "fetching ${*:2} from PyPI into $dir"
    rm -rf "$dir"
    { python3 -m venv "$dir" && "$dir/bin/pip" -q --disable-pip-version-check install "${@:2}"; } >"$cache_dir/.$1.log" 2>&1 ||
        { tail -n 8 "$cache_dir/.$1.log" >&2; die "cannot install ${*:2} (its last words are above)"; }
    rm -f "$cache_dir/.$1.log"
    touch "$dir/complete"
}
