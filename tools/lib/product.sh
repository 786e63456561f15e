# The product, started and asked the way a person does it: appliance and agent as processes of their own, everything else
# through `afterimage` commands. All of it lives in $run_dir, with ports of its own.

appliance_options=()
# product_setup: names the directories; the store may be put elsewhere by $store_elsewhere. The CLI finds the appliance by AFTERIMAGE_PROFILE.
product_setup() {
    primary_state=$run_dir/primary secondary_state=$run_dir/secondary store=${store_elsewhere:-$run_dir/secondary/store} sockets=$run_dir/s
    mkdir -p "$primary_state" "$secondary_state"
    export AFTERIMAGE_PROFILE=$secondary_state/client.json
    api_port=$(free_port) link_port=$(free_port)
    tap_socket=$sockets/vda.sock
}

appliance_command() {
    appliance_command=("$afterimage" appliance --state "$secondary_state" --store "$store" --runtime-dir "$sockets" --listen "127.0.0.1:$api_port"
        --link "127.0.0.1:$link_port" --qemu "$AFTERIMAGE_QEMU" --accel tcg "${appliance_options[@]}")
}
# The disks of a live tap are vda, vdb, …
agent_tap=nbd agent_options=()
agent_command() { # DEVICE...
    local device number=0 letters=abcdefgh
    agent_command=("$afterimage" agent run --tap "$agent_tap" --state "$primary_state" --socket-dir "$sockets" "${agent_options[@]}")
    for device; do agent_command+=(--disk "vd${letters:number:1}=$device"); number=$((number + 1)); done
}

appliance_answers() { "$afterimage" status --json </dev/null >/dev/null 2>&1; }
tap_answers() { [ -S "$tap_socket" ] && python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])' "$tap_socket" 2>/dev/null; }

agent_answers() {
    case $agent_tap in
    nbd) tap_answers ;;
    live) tail -c "+$((agent_log_bytes + 1))" "$run_dir/agent.log" 2>/dev/null | grep -q 'followed by the live tap' ;;
    esac
}

# start_appliance: sets $appliance_pid. start_agent DEVICE...: sets $agent_pid. Both wait until they answer.
start_appliance() {
    appliance_command
    start "$run_dir/appliance.log" "${appliance_command[@]}"
    appliance_pid=$started_pid
    until_true 30 answers_or_dead appliance_answers "$appliance_pid" && alive "$appliance_pid" || give_up "the appliance did not start" "$run_dir/appliance.log"
}
start_agent() {
    agent_command "$@"
    agent_log_bytes=$(stat -c %s "$run_dir/agent.log" 2>/dev/null || echo 0)
    # What is in the kernel outlives the agent.
    [ "$agent_tap" != live ] || [ -n "${will_detach:-}" ] || { defer "$afterimage" agent detach --state "$primary_state"; will_detach=1; }
    start "$run_dir/agent.log" "${agent_command[@]}"
    agent_pid=$started_pid
    until_true 30 answers_or_dead agent_answers "$agent_pid" && alive "$agent_pid" || give_up "the agent did not start" "$run_dir/agent.log"
}
answers_or_dead() { "$1" || ! alive "$2"; }
# The last words of both, for a tool that fails.
show_logs() {
    local log
    for log in "$run_dir"/appliance.log "$run_dir"/agent.log; do
        [ ! -s "$log" ] || { say "the end of $(basename "$log"):"; tail -n 12 "$log" | sed 's/^/    /' >&2; }
    done
}
give_up() { say "$1; the end of its log:"; tail -n 8 "$2" >&2; exit 1; }

# --- questions -------------------------------------------------------------------------------------------------------
# json PATH: the value at PATH (a.b.0.c, -1 = last) of the JSON on stdin; nothing when it is not there.
json() {
    python3 -c '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    try: value = value[int(key)] if isinstance(value, list) else value[key]
    except (KeyError, IndexError, TypeError): sys.exit()
if value is not None: print(json.dumps(value) if isinstance(value, (dict, list)) else value)' "$1"
}

server_json() { "$afterimage" server show "$1" --json </dev/null; }
server_field() { server_json "$1" | json "$2"; }
# full_syncs SERVER: how often it has come to Initial Full Sync, comparisons included.
full_syncs() { "$afterimage" event list --server "$1" --limit 500 --json </dev/null | python3 -c 'import json, sys; print(sum(1 for e in json.load(sys.stdin) if e.get("after") == "Initial Full Sync"))'; }
server_state_is() { [ "$(server_field "$1" state)" = "$2" ]; }

# points SERVER: one line per recovery point, oldest first: ID CUT-TIME-IN-SECONDS. Whoever reads only the first line may end before the last.
points() {
    "$afterimage" recovery-point list "$1" --json </dev/null | python3 -c '
import json, os, sys
try:
    for p in json.load(sys.stdin): print(p["id"], "%d.%09d" % divmod(p["cutTimeNanoseconds"], 10**9))
    sys.stdout.flush()
except BrokenPipeError: os._exit(0)'
}
point_after() { points "$1" | awk -v t="$2" '!found && $2 + 0 > t + 0 { print $1; found = 1 }'; }
has_point_after() { [ -n "$(point_after "$1" "$2")" ]; }
point_count_is() { [ "$(points "$1" | wc -l)" -ge "$2" ]; }

# enrol SERVER: adds the server to the pair "pair" (made when missing) and enrols the agent.
enrol() {
    local token
    "$afterimage" site-pair create pair --type zone-to-zone --primary here --secondary there </dev/null >/dev/null
    token=$("$afterimage" server add "$1" --pair pair --json </dev/null | json 0.token)
    [ -n "$token" ] || die "server add printed no enrolment token"
    "$afterimage" agent enroll --token "$token" --state "$primary_state" </dev/null >/dev/null
    until_true 30 server_state_is "$1" Initialized || die "the agent did not connect: $(server_field "$1" state), $(server_field "$1" reason)"
}
