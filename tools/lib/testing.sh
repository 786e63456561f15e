# Sourced by the shell tests in tools/tests. Each prints lines that tools/test counts:
#   ok NAME          not ok NAME: REASON          skip NAME: WHY
# A test script may say "# tier: short-guest" or "# tier: guest" in its head (it boots machines), "# limit: SECONDS", and "# alone" (no other runs beside it).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$repository/tools/lib/packages.sh"
source "$repository/tools/lib/fetch.sh"

failures=0
ok() { printf 'ok %s\n' "$1"; }
not_ok() { printf 'not ok %s: %s\n' "$1" "$2"; failures=$((failures + 1)); }
skip() { printf 'skip %s: %s\n' "$1" "$2"; }

# check NAME COMMAND...: ok when COMMAND succeeds; its output explains why it did not, and the product's logs when there are any.
check() {
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        ok "$name"
    else
        not_ok "$name" "$(tail -n 3 <<<"$output" | tr '\n' ' ')($1)"
        ! declare -F show_logs >/dev/null || show_logs
    fi
}

# refuses NAME PATTERN COMMAND...: ok when COMMAND fails and says something that matches PATTERN.
refuses() {
    local name=$1 pattern=$2 output status=0
    shift 2
    output=$(timeout 60 "$@" 2>&1 </dev/null) || status=$?
    if [ "$status" = 0 ]; then
        not_ok "$name" "it was not refused; it said: $(tail -n 2 <<<"$output" | tr '\n' ' ')"
    elif [ "$status" = 124 ]; then
        not_ok "$name" "it neither failed nor ended within 60 s: $(tail -n 2 <<<"$output" | tr '\n' ' ')"
    elif grep -qiE -- "$pattern" <<<"$output"; then
        ok "$name"
    else
        not_ok "$name" "refused (status $status), but the message does not match /$pattern/: $(tail -n 3 <<<"$output" | tr '\n' ' ')"
    fi
}

finish() { exit $((failures > 0)); }
