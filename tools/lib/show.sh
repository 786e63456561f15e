# How the quickstart talks: steps, commands, bars, verdicts. Everything goes to stdout; colours and moving bars only on a terminal.
if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'; else bold= dim= red= green= plain=; fi

step_number=0 step_name= step_started= step_lines=()
# step WORDS SHORT: ends the step before and begins the next; SHORT names it in the closing table.
step() {
    end_step
    step_number=$((step_number + 1)) step_name=$2 step_started=$(now)
    printf '\n%s%d. %s%s\n' "$bold" "$step_number" "$1" "$plain"
}
end_step() {
    [ -z "$step_name" ] || step_lines+=("$(printf '%s|%s s' "$step_name" "$(since "$step_started")")")
    step_name=
}
tell() { printf '   %s\n' "$*"; }

# shown COMMAND...: the command as a person would type it.
shown() {
    local words=() word
    for word; do
        [ "$word" != "$afterimage" ] || word=afterimage
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("'${word//\'/\'\\\'\'}'"); fi
    done
    printf '   %s$ %s%s\n' "$dim" "${words[*]}" "$plain"
}
# run COMMAND...: shows it, runs it, indents what it says; ends the tool when it fails.
run() {
    local status=0
    shown "$@"
    foreground "$@" >"$run_dir/said" 2>&1 || status=$?
    said=$(cat "$run_dir/said")
    [ -z "$said" ] || sed 's/^/     /' <<<"$said"
    [ "$status" = 0 ] || die "this command failed (exit code $status): $(shown "$@")"
}

# run_live SECONDS COMMAND...: the same for a command that takes its time: on a terminal its own progress bar is seen.
run_live() {
    local limit=$1 status=0
    shift
    shown "$@"
    if [ -t 1 ]; then
        foreground timeout --foreground -k 5 "$limit" "$@" || status=$?
    else
        foreground timeout -k 5 "$limit" "$@" > >(exec sed -u 's/^/     /') 2>&1 || status=$?
    fi
    [ "$status" != 124 ] || say "   not done after $limit s"
    return "$status"
}

checks_held=0 checks_failed=0
# verify WORDS COMMAND...: one check of the closing verdict.
verify() {
    local words=$1
    shift
    if "$@"; then
        checks_held=$((checks_held + 1))
        printf '   %s✓%s %s\n' "$green" "$plain" "$words"
    else
        checks_failed=$((checks_failed + 1))
        printf '   %s✗ %s%s\n' "$red" "$words" "$plain"
    fi
}

# spin SECONDS WORDS COMMAND...: waits until COMMAND succeeds, showing that it does.
spin() {
    local limit=$1 words=$2 end=$((SECONDS + $1)) started=$SECONDS
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || { [ ! -t 1 ] || printf '\n'; return 1; }
        [ ! -t 1 ] || printf '\r\033[K   %s … %d s' "$words" $((SECONDS - started))
        sleep 0.2
    done
    [ ! -t 1 ] || printf '\r\033[K'
}

at_most() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 <= b + 0) }'; }
at_least() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 >= b + 0) }'; }
starts_with() { [[ $1 == "$2"* ]]; }
mebibytes() { awk -v b="${1:-0}" 'BEGIN { printf "%.1f MiB", b / 1048576 }'; }
row() { printf '   %-48s %s\n' "$1" "$2"; }
