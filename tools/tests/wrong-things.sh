#!/usr/bin/env bash
# limit: 420
# Wrong things get clear words and harm nobody else.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product wrong-things
make_run_dir
size=64
protect "$size"
other=$run_dir/other
agent() { "$afterimage" agent run --tap nbd --state "$other" --socket-dir "$other/s" "$@"; }
export -f agent
export afterimage other
refused_agent() { refuses "$1" "$2" timeout -k 1 20 "$afterimage" agent run --tap nbd --state "$other" --socket-dir "$other/s" "${@:3}"; }

# --- the agent and its disk ------------------------------------------------------------------------------------------
refused_agent "agent: a missing device" "/dev/no-such-disk.*no such" --disk vda=/dev/no-such-disk
refused_agent "agent: a directory as device" "neither|not a (block device|disk)|is a directory|regular file" --disk "vda=$run_dir"
refused_agent "agent: a second agent on the same disk" "$loop_device.*(in use|held|busy|exclusive)" --disk "vda=$loop_device"
refuses "agent: a second agent with the same state directory" "another agent.*$primary_state" timeout -k 1 20 "$afterimage" agent run --tap nbd --state "$primary_state" \
    --socket-dir "$other/s" --disk "vdb=$run_dir/nothing"

truncate -s 32M "$run_dir/mounted.img"
mke2fs -q -t ext4 "$run_dir/mounted.img"
mounted=$(losetup --find --show "$run_dir/mounted.img")
mkdir "$run_dir/mnt"
mount "$mounted" "$run_dir/mnt"
refused_agent "agent: a mounted device, with its mount point" "$mounted.*mounted.*$run_dir/mnt" --disk "vda=$mounted"
umount "$run_dir/mnt"

# A disk that was 32 MiB when it was served, and is 16 MiB now.
start "$run_dir/small.log" "$afterimage" agent run --tap nbd --state "$other" --socket-dir "$other/s" --disk "vda=$mounted"
until_true 20 test -S "$other/s/vda.sock" || not_ok "agent: serves the small disk" "$(tail -n 2 "$run_dir/small.log")"
stop_process "$started_pid"
losetup -d "$mounted"
truncate -s 16M "$run_dir/mounted.img"
mounted=$(losetup --find --show "$run_dir/mounted.img")
refused_agent "agent: a device smaller than before" "vda.*(16777216|16 MiB).*(33554432|32 MiB)" --disk "vda=$mounted"
losetup -d "$mounted"

refuses "agent: a token that is none" "token" "$afterimage" agent enroll --token nonsense --state "$other"
token=$("$afterimage" server add t --pair pair --json </dev/null | json 0.token)
"$afterimage" agent enroll --token "$token" --state "$other" </dev/null >/dev/null || not_ok "agent: enrols with a fresh token" "it was refused"
refuses "agent: a token used twice" "token|used|enrol" "$afterimage" agent enroll --token "$token" --state "$run_dir/third"

# --- strangers -------------------------------------------------------------------------------------------------------
# What a TLS client without the right certificate gets from the link: in TLS 1.3 the refusal comes after its own handshake.
stranger() {
    local output
    output=$( (sleep 2; printf 'hello') | timeout 10 openssl s_client -connect "127.0.0.1:$link_port" -tls1_3 "$@" 2>&1 || true)
    grep -iE 'alert|certificate required|unknown ca|handshake failure|bad certificate' <<<"$output"
}
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=foreign -keyout "$run_dir/foreign.key" \
    -out "$run_dir/foreign.crt" 2>/dev/null
check "link: a client without a certificate is refused" stranger
check "link: a client with a foreign certificate is refused" stranger -cert "$run_dir/foreign.crt" -key "$run_dir/foreign.key"
! stranger -cert "$primary_state/enrolment/cert.pem" -key "$primary_state/enrolment/key.pem" >/dev/null && ok "link: the agent's own certificate is let in" ||
    not_ok "link: the agent's own certificate is let in" "TLS refused it"

throw_garbage() { # ADDRESS...: python's idea of an address
    python3 - "$@" <<'PYTHON'
import os, random, socket, sys
kind, target = sys.argv[1], sys.argv[2]
for seed in range(20):
    s = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    s.settimeout(10)
    s.connect(target if kind == "unix" else ("127.0.0.1", int(target)))
    data = random.Random(seed).randbytes(random.Random(seed).randrange(1, 200000))
    if seed % 4 == 1: data = b"IHAVEOPT" + data            # past the first magic number
    if seed % 4 == 2: data = b"\x16\x03\x01" + data        # looks like TLS
    if seed % 4 == 3: data = b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff" + data  # an option of 4 GiB
    try:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        while s.recv(65536): pass
    except socket.timeout: sys.exit(f"the server still listens to garbage after 10 s (seed {seed})")
    except OSError: pass
    s.close()
PYTHON
}
check "tap: garbage on its socket ends only that connection" throw_garbage unix "$tap_socket"
check "tap: still serves after the garbage" nbdinfo --size "nbd+unix:///vda?socket=$tap_socket"
check "link: garbage on its port ends only that connection" throw_garbage tcp "$link_port"
check "API: garbage on its port ends only that connection" throw_garbage tcp "$api_port"
refuses "tap: an export that does not exist" "vdz|export|unknown|not found|no such" nbdinfo "nbd+unix:///vdz?socket=$tap_socket"

# --- the operator ----------------------------------------------------------------------------------------------------
# says_why NAME EXIT_CODE PATTERN COMMAND...
says_why() {
    local name=$1 code=$2 pattern=$3 output status=0
    shift 3
    output=$(timeout 60 "$@" 2>&1 </dev/null) || status=$?
    if [ "$status" != "$code" ]; then not_ok "$name" "exit code $status instead of $code: $(tail -n 2 <<<"$output")"
    elif ! grep -qiE -- "$pattern" <<<"$output"; then not_ok "$name" "the message does not match /$pattern/: $(tail -n 2 <<<"$output")"
    else ok "$name"; fi
}
says_why "operator: no profile" 5 "profile" env AFTERIMAGE_PROFILE=/nonexistent/client.json "$afterimage" status
says_why "operator: an unknown server" 4 "nobody" "$afterimage" server show nobody
says_why "operator: failover without a recovery point" 3 "recovery point" "$afterimage" failover start s --yes s
says_why "operator: a drill before replication" 3 "replicat" "$afterimage" drill start s
check "after all that: replication reaches its first recovery point" timeout 90 "$afterimage" replication start s --wait
says_why "operator: replication that runs already" 3 "replicat|running" "$afterimage" replication start s
says_why "operator: an unknown recovery point" 4 "recovery point.*no-such-point|no-such-point" "$afterimage" drill start s --point no-such-point
says_why "operator: an unknown recovery point cannot be exported" 4 "no-such-point" "$afterimage" recovery-point export s --point no-such-point
"$afterimage" failover start s --yes s --network isolated --boot-check none </dev/null >/dev/null 2>&1 || not_ok "operator: a failover starts" "$("$afterimage" status)"
says_why "operator: failover while one is running, or done" 3 "failover" "$afterimage" failover start s --yes s
until_true 60 server_state_is s "Failed Over" || not_ok "operator: the failover ends" "$(server_field s state), $(server_field s reason)"
says_why "operator: a drill after failover" 3 "fail" "$afterimage" drill start s
fenced() { [ "$(grep -ciE 'fenced' "$run_dir/agent.log")" -gt 0 ]; }
until_true 30 fenced && ok "agent: is fenced after the failover, and says so" || not_ok "agent: is fenced after the failover, and says so" "$(tail -n 3 "$run_dir/agent.log")"
check "tap: still serves the disk when it is fenced" nbdinfo --size "nbd+unix:///vda?socket=$tap_socket"
unprotect
for pid in $(processes_naming "$sockets"); do kill_now "$pid"; done

# --- a full store ----------------------------------------------------------------------------------------------------
truncate -s 512M "$run_dir/store.img"
mke2fs -q -t ext4 -m 0 "$run_dir/store.img"
small=$(losetup --find --show "$run_dir/store.img")
mkdir "$run_dir/small"
mount "$small" "$run_dir/small"
fallocate -l 380M "$run_dir/small/ballast"
store_elsewhere=$run_dir/small/store
protect 256
start_writer
"$afterimage" replication start s </dev/null >/dev/null
told() { "$afterimage" status </dev/null 2>&1 | grep -iE 'full|no space|space left'; }
until_true 60 told >/dev/null && ok "full store: status says so" ||
    not_ok "full store: status says so" "$("$afterimage" status 2>&1 | tail -n 8 | tr '\n' ' ') $(grep -iE 'full|space' "$run_dir/appliance.log" | tail -n 2)"
check "full store: the appliance goes on answering" appliance_answers
rm "$run_dir/small/ballast"
has_points() { [ -n "$(points s)" ]; }
until_true 120 has_points && ok "full store: replication goes on by itself when there is room again" ||
    not_ok "full store: replication goes on by itself when there is room again" "$(server_field s state), $(server_field s reason)"
stop_writer && [[ $writer_said == *" interruptions=0" ]] && ok "full store: the writer notices nothing" || not_ok "full store: the writer notices nothing" "$writer_said"
check "full store: the next recovery point is exact" exact_after "$(now)"
kill_now "$agent_pid" "$appliance_pid"
unprotect
until_true 10 umount "$run_dir/small" 2>/dev/null || not_ok "full store" "it cannot be unmounted"
losetup -d "$small"
finish
