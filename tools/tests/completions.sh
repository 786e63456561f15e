#!/usr/bin/env bash
# limit: 60
# The completions are made, each shell accepts its own, and bash's complete what there is.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/build.sh"

export AFTERIMAGE=${AFTERIMAGE:-$build_dir/release/afterimage}
[ -x "$AFTERIMAGE" ] || { skip completions "there is no built afterimage"; finish; }
make_run_dir
made=$run_dir/completions
check "the completions are made" "$repository/tools/completions" --output "$made"
check "bash accepts its own" bash -n "$made/bash-completion/completions/afterimage"
completed() {
    PATH=$(dirname "$AFTERIMAGE"):$PATH bash -c '
        source "$1"
        COMP_WORDS=(afterimage repl) COMP_CWORD=1 COMP_LINE="afterimage repl" COMP_POINT=15
        function=$(complete -p afterimage | sed "s/.*-F \([^ ]*\).*/\1/")
        "$function" afterimage repl afterimage
        printf "%s\n" "${COMPREPLY[@]}"' complete "$made/bash-completion/completions/afterimage" | grep -qx 'replication *'
}
check "bash completes a command" completed
for shell in zsh fish; do
    if command -v "$shell" >/dev/null; then
        case $shell in
        zsh) script=zsh/site-functions/_afterimage ;;
        fish) script=fish/vendor_completions.d/afterimage.fish ;;
        esac
        check "$shell accepts its own" "$shell" -n "$made/$script"
    else
        skip "$shell accepts its own" "there is no $shell (Debian: $shell)"
    fi
done
finish
