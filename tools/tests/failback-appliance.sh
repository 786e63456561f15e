#!/usr/bin/env bash
# limit: 1200
# The way back into another appliance: failed over here with the source dead, committed, written to; followed by the appliance over there, which has an older
# replica, by what differs; taken over there gracefully, with another machine; protected here again; failed over here without asking. Either side is killed on the
# way, and each time exactly one of both runs. What must be equal is compared byte by byte.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product failback-appliance
make_run_dir
# --- two appliances: here (server s) and there (server m) -----------------------------------------------------------------
disk_file=$run_dir/disk.img
head -c 24M /dev/urandom >"$disk_file"
attach_loop "$disk_file"
product_setup
here_profile=$AFTERIMAGE_PROFILE there_state=$run_dir/there there_api=$(free_port) there_link=$(free_port)
mkdir -p "$there_state"
here() { AFTERIMAGE_PROFILE=$here_profile "$afterimage" "$@" </dev/null; }
there() { AFTERIMAGE_PROFILE=$there_state/client.json "$afterimage" "$@" </dev/null; }
server_of() { if [ "$1" = here ]; then echo s; else echo m; fi; }
field() { "$1" server show "$(server_of "$1")" --json | json "$2"; } # SITE PATH
state_is() { [ "$(field "$1" state)" = "$2" ]; }
there_answers() { there status --json >/dev/null 2>&1; }
start_there() {
    start "$run_dir/there.log" "$afterimage" appliance --state "$there_state" --store "$there_state/store" --runtime-dir "$run_dir/t" --listen "127.0.0.1:$there_api" \
        --link "127.0.0.1:$there_link" --qemu "$AFTERIMAGE_QEMU" --accel tcg
    there_pid=$started_pid
    until_true 30 answers_or_dead there_answers "$there_pid" && alive "$there_pid" || give_up "the appliance over there did not start" "$run_dir/there.log"
}
kill_here() { kill_now "$appliance_pid" && start_appliance; }
kill_there() { kill_now "$there_pid" && start_there; }
show_logs() { for log in appliance there agent; do [ ! -s "$run_dir/$log.log" ] || { say "the end of $log.log:"; tail -n 25 "$run_dir/$log.log" | sed 's/^/    /' >&2; }; done; }

# machine SITE PATH: of its failed-over machine. Its guest is nobody: asked to shut down it does nothing, until end_guest plays it.
machine() { field "$1" "instances.-1.$2"; }
machine_process() { pgrep -f -- "-name afterimage-$1" || true; }
runs() { [ -n "$(machine_process "$(machine "$1" id)")" ] && [ "$(machine "$1" step)" = ready ]; }
runs_not() { local id; id=$(machine "$1" id); [ -z "$id" ] || [ -z "$(machine_process "$id")" ]; }
end_guest() { local pid; pid=$(machine_process "$(machine "$1" id)"); [ -z "$pid" ] || kill -TERM "$pid"; }
uri() { echo "nbd+unix:///vda?socket=$(machine "$1" nbdSocketPath)"; }
image() { qemu-img convert -f raw -O raw "$(uri "$1")" "$2"; }
machine_is() { qemu-img compare -T none -f raw -F raw "$(uri "$1")" "$2" 2>&1; } # SITE FILE
writes() { # SITE: its machine writes for a moment, at least once
    local pid seconds
    for seconds in 1 2 4 8 16; do
        start "$run_dir/writer.log" python3 "$repository/tools/lib/nbd.py" write "$(machine "$1" nbdSocketPath)" vda --seed "$RANDOM"
        pid=$started_pid
        sleep "$seconds"
        kill -TERM "$pid"
        until_true 60 process_gone "$pid"
        ! tail -n 1 "$run_dir/writer.log" | grep -q '^writes=[1-9]' || return 0
    done
    die "nothing was written to the machine's disk"
}
differing() { # FILE FILE: bytes, in blocks
    python3 - "$@" <<'PYTHON'
import sys
a, b = (open(path, "rb").read() for path in sys.argv[1:])
print(sum(4096 for i in range(0, len(a), 4096) if a[i:i + 4096] != b[i:i + 4096]))
PYTHON
}
newest() { "$1" recovery-point list "$(server_of "$1")" --json | json -1.id; }
point_is() { # SITE POINT FILE
    local status=0 server
    server=$(server_of "$1")
    qemu-img compare -T none -f raw -F raw "$("$1" recovery-point export "$server" --point "$2" --json | json uris.0)" "$3" 2>&1 || status=$?
    "$1" recovery-point unexport "$server" --point "$2" >/dev/null
    return "$status"
}
newest_is() { point_is "$1" "$(newest "$1")" "$2" >/dev/null 2>&1; }
task_failed_with() { "$1" task list --server "$(server_of "$1")" --limit 1 --json | json 0.error | grep -qE -- "$2"; }
shows() { "$1" server show "$(server_of "$1")" | grep -qE -- "$2"; }
token_of() { "$@" --json | json token; }

start_appliance
start_there
for site in here there; do "$site" site-pair create pair --type zone-to-zone --primary a --secondary b >/dev/null; done
# There: an older replica, of the agent that was.
"$afterimage" agent enroll --token "$(there server add m --pair pair --json | json 0.token)" --state "$primary_state" </dev/null >/dev/null
start_agent "$loop_device"
until_true 30 state_is there Initialized || die "the agent did not connect to the appliance over there"
there replication start m --epoch-ms 300 --wait >/dev/null
cp "$disk_file" "$run_dir/older.img"
there replication stop m >/dev/null
until_true 30 state_is there Initialized || die "replication over there does not stop"
kill -TERM "$agent_pid"
until_true 30 process_gone "$agent_pid"
# Here: protected, lost, failed over, committed.
primary_state=$run_dir/primary2
"$afterimage" agent enroll --token "$(here server add s --pair pair --json | json 0.token)" --state "$primary_state" </dev/null >/dev/null
start_agent "$loop_device"
until_true 30 state_is here Initialized || die "the agent did not connect to the appliance here"
here replication start s --policy all:1h --epoch-ms 300 --wait >/dev/null
start_writer
sleep 1
stop_writer
check "what was written is there" exact_after "$(date +%s.%N)"
kill_now "$agent_pid"
check "failover" here failover start s --memory 64 --wait --yes s
token=$(token_of there server token m)
refuses "registering before the commit" "Commit the failover first" "$afterimage" reverse register s --appliance "$token"
check "commit" here failover commit s --yes s
writes here

# --- registered ---------------------------------------------------------------------------------------------------------------
refuses "a token that is none" "not an enrolment token" "$afterimage" reverse register s --appliance nonsense
here server add other --pair pair --json >"$run_dir/own.json"
refuses "the appliance's own token" "of this appliance itself" "$afterimage" reverse register s --appliance "$(json 0.token <"$run_dir/own.json")"
check "the appliance over there is registered" here reverse register s --appliance "$token"
refuses "the same token again" "not valid" "$afterimage" reverse register s --appliance "$token"
check "it is connected" until_true 30 state_is here "Reversed Initialized"
check "there it is a server whose agent is connected" until_true 30 state_is there Initialized
there replication start m --epoch-ms 300 >/dev/null
check "nothing is sent before it is permitted here: said there" until_true 30 shows there "not initiated where the machine runs"
refuses "without saying where to" "--to-appliance" "$afterimage" reverse start s --original-machine --confirm x
refuses "without confirmation" "confirmed by its name" "$afterimage" reverse start s --to-appliance
refuses "confirmed by another's name" "confirmed by its name" "$afterimage" reverse start s --to-appliance --yes m

# --- reverse replication ----------------------------------------------------------------------------------------------------
image here "$run_dir/machine.img"
expected=$(differing "$run_dir/older.img" "$run_dir/machine.img")
here reverse start s --to-appliance --yes s >/dev/null
kill_here
connected_again() { [ "$(field here reverse.isConnected)" = True ]; }
check "killed here as it begins: it goes on" until_true 60 connected_again
kill_there
check "killed there as it begins: it goes on" until_true 120 state_is here "Reversed Replicating"
check "there it is Replicating" until_true 60 state_is there Replicating
sent=$(field here reverse.sentBytes)
printf 'differing %s bytes, sent %s\n' "$expected" "$sent"
check "only what differs was sent" [ $((sent * 10)) -le $((expected * 11)) ]
check "there is what runs here, byte by byte" until_true 60 newest_is there "$run_dir/machine.img"
writes here
kill_here
check "killed here: followed again" until_true 90 state_is here "Reversed Replicating"
writes here
kill_there
image here "$run_dir/machine.img"
check "killed there: followed again, byte by byte" until_true 90 newest_is there "$run_dir/machine.img"
refuses "a failback is asked for there" "failover start m --graceful" "$afterimage" failback start s --yes s

# --- moves that are taken back ------------------------------------------------------------------------------------------------
ready_to_move() { until_true 120 state_is there Replicating && until_true 60 state_is here "Reversed Replicating" && until_true 60 runs here; }
begins_to_move() { ready_to_move && there failover start m --graceful --memory 64 --yes m >/dev/null && until_true 30 state_is here "Failback In Progress"; }
taken_back() { until_true 120 state_is there Replicating && until_true 60 state_is here "Reversed Replicating" && until_true 60 runs here && runs_not there; }
check "a move begins: the machine here is asked to shut down" begins_to_move
check "cancelled here" here failback cancel s
end_guest here
check "the failover there fails, and says why" until_true 60 task_failed_with there "let go|cancelled"
check "the machine runs here again, and only here" taken_back

check "a move begins again" begins_to_move
kill_here
check "killed here while it is held: the machine runs here, and only here" taken_back

check "and again" begins_to_move
kill_now "$there_pid"
end_guest here
check "killed there while it is held: the hold runs out" until_true 90 grep -q "has not repeated it" "$run_dir/appliance.log"
check "the machine runs here" until_true 60 runs here
start_there
check "and only here" taken_back

# --- the move ------------------------------------------------------------------------------------------------------------------
writes here
cp /bin/true "$run_dir/boot-check"
ready_to_move || not_ok "ready to move" "$(field here state), $(field there state)"
image here "$run_dir/machine.img"
there failover start m --graceful --cpus 2 --memory 96 --boot-check "script:$run_dir/boot-check" --yes m >/dev/null
until_true 30 state_is here "Failback In Progress"
handed_over() { [ "$(field here reverse.step)" = handedOver ]; }
end_guest here
check "the guest shuts down: the machine is handed over" until_true 60 handed_over
kill_now "$there_pid"
kill_here
start_there
check "both killed right after the fence: here Failed Back" until_true 60 state_is here "Failed Back"
check "there it is Failed Over" until_true 120 state_is there "Failed Over"
check "with the machine that was asked for there" [ "$(machine there machine.cpus) $(machine there machine.memoryMiB)" = "2 96" ]
check "its disk is what ran here, byte by byte" machine_is there "$run_dir/machine.img"
no_machine() { [ "$(field "$1" instances)" = "[]" ]; }
check "no machine is left here" until_true 60 no_machine here
check "a recovery point of it is" newest_is here "$run_dir/machine.img"
refuses "starting the machine here" "Not while" "$afterimage" failover start-machine s

# --- the way forward again: there it runs, here it is protected ----------------------------------------------------------------
there failover commit m --yes m >/dev/null
writes there
check "registered there with the appliance here" there reverse register m --appliance "$(token_of here registration s)"
check "here its agent is connected" until_true 60 state_is here Initialized
image there "$run_dir/machine2.img"
expected=$(differing "$run_dir/machine.img" "$run_dir/machine2.img")
here replication start s --epoch-ms 300 >/dev/null
there reverse start m --to-appliance --yes m >/dev/null
check "protected here again" until_true 120 state_is here Replicating
check "Reversed Replicating there" until_true 60 state_is there "Reversed Replicating"
sent=$(field there reverse.sentBytes)
printf 'differing %s bytes, sent %s\n' "$expected" "$sent"
check "by delta" [ $((sent * 10)) -le $((expected * 11)) ]
check "byte by byte" until_true 60 newest_is here "$run_dir/machine2.img"
drill() { here drill start s --memory 64 --wait && here drill clear s --wait; }
check "a drill here" drill

# --- failed over here, without asking ------------------------------------------------------------------------------------------
here replication pause s >/dev/null
writes there
image there "$run_dir/last.img"
check "failover here, while the machine runs there" here failover start s --memory 64 --wait --yes s
check "there the machine is stopped" until_true 30 runs_not there
check "and it is said why" until_true 30 shows there "without the machine's last writes"
check "here it has what was followed" machine_is here "$run_dir/machine2.img"
kill_there
check "killed there: it stays stopped" runs_not there
check "Failed Back there, when the failover here was not rolled back" until_true 180 state_is there "Failed Back"
held_is_last() { point_is there "$(there recovery-point list m --json | python3 -c 'import json, sys; print([p["id"] for p in json.load(sys.stdin) if (p.get("hold") or "").startswith("fenced-")][-1])')" "$run_dir/last.img"; }
check "what it had written last there is a held recovery point, byte by byte" held_is_last
finish
