#!/usr/bin/env bash
# limit: 240
# What happens, told while it does: over a SIGKILL of the appliance nothing is missed and nothing told twice; who may not any more is told nothing; streams do not keep the
# appliance from stopping.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product event-stream
make_run_dir
product_setup
start_appliance
ai() { "$afterimage" "$@" </dev/null; }
export -f ai
export afterimage

start "$run_dir/follow" "$afterimage" event follow --json
follow_pid=$started_pid
start "$run_dir/words" "$afterimage" event follow
# told WHAT: the follower has an event of that name
told() { grep -q "\"what\":\"$1\"" "$run_dir/follow"; }
# Asked for again until it is seen: the stream begins when it is connected.
first_is_told() { ai token create "t$RANDOM" --role viewer >/dev/null; told "Create token"; }
check "an event is told" until_true 60 first_is_told
ai site-pair create pair --type zone-to-zone --primary here --secondary there >/dev/null
check "and the next" until_true 30 told "Create site pair"
kill_now "$appliance_pid"
start_appliance
ai server add a b c --pair pair >/dev/null
check "told after the appliance was killed" until_true 60 told "Add server"
told_once_in_order() {
    python3 - "$run_dir/follow" <<'P'
import json, sys
lines = [line for line in open(sys.argv[1]) if line.startswith("{")]
ids = [m["data"]["id"] for m in map(json.loads, lines) if m["event"] == "audit"]
sys.exit(0 if ids == list(range(ids[0], ids[-1] + 1)) else f"not each once, in order: {ids}")
P
}
check "each once, in order, none missed" told_once_in_order
check "in words, too" until_true 30 grep -q "Create site pair  .*zone-to-zone: here to there" "$run_dir/words"

ai token create watcher --role viewer --write-profile "$run_dir/watcher.json" >/dev/null
start "$run_dir/watched" "$afterimage" event follow --json --profile "$run_dir/watcher.json"
watcher_pid=$started_pid
watcher_is_told() { ai token create "w$RANDOM" --role viewer >/dev/null; grep -q '"Create token"' "$run_dir/watched"; }
check "a viewer is told" until_true 60 watcher_is_told
ai token revoke watcher >/dev/null
check "until its token is revoked" until_true 60 process_gone "$watcher_pid"
check "and told why" grep -q "not known here, was revoked" "$run_dir/watched"

kill -TERM "$appliance_pid"
check "the appliance stops, whoever follows" until_true 30 process_gone "$appliance_pid"
check "who goes on waiting for it" alive "$follow_pid"
finish
