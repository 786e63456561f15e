# Debian packages: what is missing is installed; what the system should not be changed for is fetched and unpacked
# privately. Mirrors are taken from the machine's own apt configuration.

os_release() { (. /etc/os-release 2>/dev/null && printf '%s' "${!1:-}"); }

require_root() { [ "$(id -u)" = 0 ] || die "$tool_name must run as root (it makes loop devices): sudo $0"; }

require_debian() {
    command -v apt-get >/dev/null && [ "$(os_release ID)" = debian ] ||
        die "this needs Debian 12 or newer (found: $(os_release PRETTY_NAME)); what it would install by apt-get: $*"
    [ "$(os_release VERSION_ID | cut -d. -f1)" -ge 12 ] 2>/dev/null || [ -z "$(os_release VERSION_ID)" ] ||
        die "this needs Debian 12 or newer, found $(os_release PRETTY_NAME)"
}

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

# need_packages NAME...: installs those that are missing; quiet unless there is something to do.
need_packages() {
    local missing=() name log
    for name; do installed "$name" || missing+=("$name"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    require_debian "${missing[@]}"
    [ "$(id -u)" = 0 ] || die "these Debian packages are missing; install them first: sudo apt-get install ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    log=$(mktemp /tmp/afterimage-apt.XXXXXX)
    if ! apt_install "${missing[@]}" >"$log" 2>&1 && ! { system_apt update && apt_install "${missing[@]}"; } >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: ${missing[*]} (its last words are above)"
    fi
    rm -f "$log"
}
system_apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"; }
apt_install() { system_apt install -y --no-install-recommends "$@"; }

# The Debian mirror that this machine already uses.
debian_mirror() {
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(LABEL) $(CODENAME)' 'Created-By: Packages' |
        awk -v suite="$(os_release VERSION_CODENAME)" '$2 == "Debian" && $3 == suite { print $1; exit }')
    if [ -z "$mirror" ] && [ "$(id -u)" = 0 ] && [ -z "${mirror_asked:-}" ]; then
        system_apt update >/dev/null 2>&1 || true
        mirror_asked=1 debian_mirror
        return
    fi
    [ -n "$mirror" ] || die "apt knows no Debian mirror for $(os_release VERSION_CODENAME): check /etc/apt/sources.list, then apt-get update"
    printf '%s' "$mirror"
}

# private_apt DIR SUITE: readies apt with sources, lists and cache of its own in DIR; apt's options are then in ${private[@]}.
# The system's own suite comes along, so that dependencies can be found.
private_apt() {
    local dir=$1 suite=$2 mirror
    require_debian "packages of $suite"
    mirror=$(debian_mirror)
    mkdir -p "$dir"/{sources,lists/partial,cache/archives/partial}
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
        "$mirror" "$(printf '%s\n' "$(os_release VERSION_CODENAME)" "$suite" | sort -u | xargs)" >"$dir/sources/debian.sources"
    private=(-q -o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=$dir/sources" -o "Dir::State::Lists=$dir/lists"
        -o "Dir::Cache=$dir/cache" -o "APT::Sandbox::User=root" -o "Acquire::Retries=3" -o "Acquire::Languages=none")
    apt-get "${private[@]}" update >"$dir/log" 2>&1 && ! grep -q '^[WE]: Failed' "$dir/log" ||
        { tail -n 5 "$dir/log" >&2; die "cannot read the package lists of $suite from $mirror"; }
}

# unpack_downloads DIR ROOT
unpack_downloads() {
    local package
    for package in "$1"/cache/archives/*.deb "$1"/*.deb; do [ ! -f "$package" ] || dpkg -x "$package" "$2"; done
}
