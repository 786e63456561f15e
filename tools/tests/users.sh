#!/usr/bin/env bash
# limit: 240
# People: the first administrator's password, logging in over a CA that is compared, roles, and the end of sessions; over a SIGKILL of the appliance.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product users
make_run_dir
product_setup
start_appliance
ai() { "$afterimage" "$@" </dev/null; }
signed_in() { local who=$1; shift; "$afterimage" "$@" --profile "$run_dir/$who.json" </dev/null; }
export -f ai signed_in
export afterimage run_dir

first=$secondary_state/administrator-password
url=$(json url <"$AFTERIMAGE_PROFILE")
fingerprint=$(openssl x509 -in "$secondary_state/ca/ca.pem" -outform DER | sha256sum | cut -d' ' -f1)
log_in() { # USER PASSWORD-FILE FINGERPRINT
    "$afterimage" login "$url" --user "$1" --password-file "$2" --ca-fingerprint "$3" --profile "$run_dir/$1.json" </dev/null
}
export -f log_in
export url
exit_code_is() { local wanted=$1 got=0; shift; "$@" || got=$?; [ "$got" = "$wanted" ] || { echo "exit code $got, not $wanted"; return 1; }; }

check "the first password is for the appliance's owner only" test "$(stat -c %a "$first")" = 600
check "its log says where it is" grep -q "user administrator has its first password in $first" "$run_dir/appliance.log"
check "and which fingerprint its CA has" grep -q "the fingerprint of its CA is $fingerprint" "$run_dir/appliance.log"
! grep -qF "$(cat "$first")" "$run_dir/appliance.log" && ok "but not the password" || not_ok "but not the password" "it is in the log"
refuses "another CA" "has the fingerprint $fingerprint: not logged in" bash -c 'log_in "$@"' log_in administrator "$first" "${fingerprint//[0-9]/0}"
refuses "no fingerprint, and nobody to ask" "not logged in" "$afterimage" login "$url" --user administrator --password-file "$first" --profile "$run_dir/x.json"
check "the administrator logs in" log_in administrator "$first" "$fingerprint"
check "only its owner can read the profile" test "$(stat -c %a "$run_dir/administrator.json")" = 600
echo "a password of ann" >"$run_dir/ann.password"
echo "short" >"$run_dir/short"
echo "another password" >"$run_dir/other"
check "and makes a user" signed_in administrator user create ann --role operator --password-file "$run_dir/ann.password"
refuses "a short password" "12 to 200 characters" bash -c 'signed_in "$@"' signed_in administrator user create bob --role viewer --password-file "$run_dir/short"
refuses "a user twice" "There is a user ann already" bash -c 'signed_in "$@"' signed_in administrator user create ann --role viewer --password-file "$run_dir/ann.password"
refuses "the end of the last administrator" "the only user that is an administrator" bash -c 'signed_in "$@"' signed_in administrator user delete administrator
check "who logs in" log_in ann "$run_dir/ann.password" "$fingerprint"
check "a wrong password is no way in" exit_code_is 6 log_in ann "$run_dir/other" "$fingerprint"
check "a role is enough, or not" bash -c 'signed_in ann status && signed_in ann user list; [ $? = 6 ]'
check "the first password is changed" signed_in administrator user set-password administrator --password-file "$run_dir/other"
check "and its file is gone" test ! -e "$first"
check "with the sessions of before" exit_code_is 6 signed_in administrator status
kill_now "$appliance_pid"
start_appliance
check "a session outlives the appliance" signed_in ann status
check "no first password comes again" test ! -e "$first"
check "the new one is good" log_in administrator "$run_dir/other" "$fingerprint"
check "a user is deleted" signed_in administrator user delete ann
check "and let in no more" exit_code_is 6 signed_in ann status
who_did_it() { ai event list --json | python3 -c '
import json, sys
whats = {(e["who"], e["what"]) for e in json.load(sys.stdin)}
missing = {("ann (user)", "Log in"), ("administrator (user)", "Delete user"), ("administrator (user)", "Set password"), ("appliance", "Create user")} - whats
sys.exit(f"not in the audit log: {missing}" if missing else 0)'; }
check "the audit log says who did it" who_did_it
finish
