#!/usr/bin/env bash
# alone
# tier: short-guest
# limit: 420
# The main job, end to end: replication, drill, disaster and failover of a machine that can tell whether it lost anything.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"

make_run_dir
if foreground "$repository/tools/quickstart" >"$run_dir/log" 2>&1; then
    ok "quickstart"
    sed -n 's/^ *✓ //p' "$run_dir/log" | while read -r line; do ok "quickstart: $line"; done
    sed -n '/^What happened/,$p' "$run_dir/log"
else
    sed -n 's/^ *✗ //p' "$run_dir/log" | while read -r line; do printf 'not ok quickstart: %s\n' "$line"; done
    not_ok "quickstart" "exit code not 0; the end of what it said: $(tail -n 25 "$run_dir/log" | sed 's/^/\n    /')"
fi
finish
