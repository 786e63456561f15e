#!/usr/bin/env bash
# limit: 400
# The API against its own document: it is valid OpenAPI 3.1, and schemathesis asks every route what fits it and what does not. What comes to its mind could do harm to a host
# (files, devices, mounts, webhooks), so all of it runs where nothing but the run's directory can be written, no device can be seen, and the network ends at this machine.
# AFTERIMAGE_KEEP=DIR: what was found is put there.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"
source "$repository/tools/lib/python.sh"

if [ "${1:-}" != apart ]; then
    need_product api
    need_python api schemathesis==4.32.5 openapi-spec-validator==0.9.0
    need_packages iproute2
    make_run_dir
    status=0
    foreground unshare --mount --net --propagation private "$0" apart "$run_dir" "$afterimage" "$python_dir" || status=$?
    [ "$status" = 0 ] || [ -z "${AFTERIMAGE_KEEP:-}" ] || cp "$run_dir"/{fuzz.log,openapi.json,appliance.log} "$AFTERIMAGE_KEEP/"
    exit "$status"
fi

# --- apart from the host ---------------------------------------------------------------------------------------------------
run_dir=$2 afterimage=$3 python_dir=$4
mount --bind "$run_dir" "$run_dir"
# What may be written here is below it, whatever calls itself temporary.
export TMPDIR=$run_dir/tmp HOME=$run_dir/home
mkdir "$TMPDIR" "$HOME" "$run_dir/work" "$run_dir/dev"
ip link set lo up
while read -r _ point kind _; do
    case $point:$kind in
    "$run_dir":* | *:proc | *:sysfs | *:cgroup* | *:devpts | *:mqueue | /dev:*) ;;
    *) mount -o remount,bind,ro "$(printf '%b' "$point")" ;;
    esac
done < <(awk '{ print $1, $2, $3 }' /proc/self/mounts)
AFTERIMAGE_QEMU=/bin/false                                         # no machines: they have tests of their own
protect 8
hide_devices() {
    local name
    for name in null zero full random urandom; do
        touch "$run_dir/dev/$name"
        mount --bind "/dev/$name" "$run_dir/dev/$name"
    done
    ln -s /proc/self/fd "$run_dir/dev/fd"
    mkdir "$run_dir/dev/shm"
    mount --rbind "$run_dir/dev" /dev
    # Its file has no name in here by which the end would find it.
    defer losetup --detach "$loop_device"
    defer umount -l /dev
}
ai() { "$afterimage" "$@" </dev/null; }
export -f ai
export afterimage

# --- somebody's servers -----------------------------------------------------------------------------------------------------
ai replication start s --policy keep-all --wait >/dev/null
until_true 60 server_state_is s Replicating || give_up "it does not replicate" "$run_dir/agent.log"
ai recovery-point create s --note "before" --wait >/dev/null
point=$(points s | tail -n 1 | cut -d' ' -f1)
ai recovery-point hold s "$point" --name gold >/dev/null
ai recovery-point export s --point "$point" >/dev/null
ai server add web db --pair pair >/dev/null
ai token create watcher --role viewer >/dev/null
ai alert-channel create hook --webhook "http://127.0.0.1:9/" >/dev/null
hide_devices
nothing_to_harm() {
    [ -z "$(find /dev -type b 2>/dev/null)" ] && ! touch /afterimage-was-here 2>/dev/null && ! touch /tmp/afterimage-was-here 2>/dev/null && [ "$(ip -o link show up | cut -d: -f2 | xargs)" = lo ]
}
nothing_to_harm || { not_ok "the host is out of reach" "it is not: nothing was asked"; finish; }
ok "the host is out of reach"

# --- the document -----------------------------------------------------------------------------------------------------------
url=$(json url <"$AFTERIMAGE_PROFILE") token=$(json token <"$AFTERIMAGE_PROFILE") ca=$secondary_state/ca/ca.pem
ask() { curl -sS --fail-with-body --cacert "$ca" -H "Authorization: Bearer $token" "$@"; }
curl -sS --fail --cacert "$ca" "$url/v1/openapi.json" >"$run_dir/openapi.json" || give_up "no document" "$run_dir/appliance.log"
check "the document is valid OpenAPI" "$python_dir/bin/openapi-spec-validator" "$run_dir/openapi.json"

# --- everything that comes to schemathesis' mind -----------------------------------------------------------------------------
cat >"$run_dir/work/schemathesis.toml" <<TOML
seed = 1
# More than one trip over each other in the ast module of Python 3.11.
workers = 1
request-timeout = 30
[generation]
max-examples = 20
database = "none"
[dictionaries.servers]
values = ["s", "web", "db", "none"]
[dictionaries.points]
values = ["$point", "latest", "none"]
[parameters]
"path.server" = { dictionary = "servers", probability = 0.8 }
"path.point" = { dictionary = "points", probability = 0.8 }
# What fits the schema may still be refused by the state table, or by rules that a schema does not say.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "412", "422", "429"]
TOML
# Who shows wrong tokens again and again is answered 429, which schemathesis does not take for a refusal: asked without it.
fuzz() {
    cd "$run_dir/work" || return 1
    "$python_dir/bin/schemathesis" --config-file schemathesis.toml run "$run_dir/openapi.json" --url "$url" --tls-verify "$ca" -H "Authorization: Bearer $token" \
        --checks all --exclude-checks ignored_auth --exclude-path /v1/stream --no-color --output-sanitize false "$@" >"$run_dir/fuzz.log" 2>&1
}
if fuzz; then
    ok "schemathesis: $(grep -E 'Test cases|generated' "$run_dir/fuzz.log" | tail -n 1 | tr -s ' ')"
else
    not_ok "schemathesis" "what it found is above"
    sed -n '/= FAILURES\|= ERRORS/,$p' "$run_dir/fuzz.log" | head -n 300 >&2
fi
wrong_tokens_are_refused() {
    python3 - "$run_dir/openapi.json" "$url" "$ca" <<'P'
import json, re, ssl, sys, urllib.error, urllib.request
document, url, ca = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
context, asked = ssl.create_default_context(cafile=ca), 0
for path, item in document["paths"].items():
    for method, operation in item.items():
        if "security" not in operation: continue
        request = urllib.request.Request(url + re.sub(r"{\w+}", "s", path), method=method.upper(), headers={"Authorization": "Bearer wrong"})
        try: sys.exit(f"{method} {path}: {urllib.request.urlopen(request, context=context).status}")
        except urllib.error.HTTPError as error:
            if error.code not in (401, 429): sys.exit(f"{method} {path}: {error.code}")
        asked += 1
sys.exit(0 if asked > 40 else f"only {asked} routes were asked")
P
}
check "a wrong token is refused by every route that wants one" wrong_tokens_are_refused
no_failure_logged() { ! grep -E " error |\[error\]" "$run_dir/appliance.log"; }
check "the appliance says of nothing that it failed" no_failure_logged
check "it answers as before" ai status
kill -TERM "$appliance_pid"
check "it stops when it is told to" until_true 30 process_gone "$appliance_pid"
finish
