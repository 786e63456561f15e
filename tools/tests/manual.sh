#!/usr/bin/env bash
# limit: 60
# Every command has a manual page, which man(1) can print.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/build.sh"

export AFTERIMAGE=${AFTERIMAGE:-$build_dir/release/afterimage}
[ -x "$AFTERIMAGE" ] && [ -x "$build_dir/release/generate-manual" ] || { skip manual "there is no built afterimage, or no generate-manual"; finish; }
make_run_dir
check "the pages are made" "$repository/tools/manual" --output "$run_dir/man"
# The commands, from the program's own description of itself.
commands() {
    "$AFTERIMAGE" --experimental-dump-help | python3 -c '
import json, sys
def walk(command, path):
    path = path + [command["commandName"]]
    print("-".join(path))
    for sub in command.get("subcommands", []): walk(sub, path)
walk(json.load(sys.stdin)["command"], [])'
}
all_there() {
    local command missing=0
    for command in $(commands); do [ -s "$run_dir/man/man1/$command.1" ] || { echo "no page $command"; missing=1; }; done
    return "$missing"
}
check "every command has one" all_there
if command -v man >/dev/null && command -v groff >/dev/null; then
    printable() {
        local page said status=0
        for page in "$run_dir"/man/man1/*.1; do
            said=$(LC_ALL=C.UTF-8 MANWIDTH=80 man --warnings -l "$page" 2>&1 >/dev/null) || status=1
            [ -z "$said" ] || { echo "$(basename "$page"): $said"; status=1; }
        done
        return "$status"
    }
    check "man prints them without a warning" printable
else
    skip "man prints them without a warning" "there is no man, or no groff (Debian: man-db, groff)"
fi
finish
