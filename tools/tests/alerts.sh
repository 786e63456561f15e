#!/usr/bin/env bash
# limit: 300
# Alerts: raised once, told by webhook and by mail, told again until they arrive, also when the appliance is killed meanwhile, and told when they are over.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/protected.sh"

need_product alerts
make_run_dir
sink=$run_dir/sink
mkdir "$sink"
start "$run_dir/sink.log" python3 "$repository/tools/lib/alert-sink.py" "$sink"
until_true 20 test -e "$sink/ports" || give_up "the sink did not start" "$run_dir/sink.log"
read -r http_port smtp_port <"$sink/ports"
protect 8
ai() { "$afterimage" "$@" </dev/null; }
export -f ai
export afterimage
alert_is() { # KIND OVER: whether the newest alert of that kind is over (yes or no)
    [ "$(ai alert list --all --json | python3 -c '
import json, sys
alerts = [a for a in json.load(sys.stdin) if a["kind"] == sys.argv[1]]
print("none" if not alerts else "yes" if alerts[0].get("cleared") else "no", len(alerts))' "$1")" = "$2" ]
}
# told KIND: what the sink has of it so far, in order
hooks() { python3 - "$sink" "$1" <<'P'
import json, os, sys
news = []
for number in range(1, 1000):
    path = f"{sys.argv[1]}/hook.{number}"
    if not os.path.exists(path): break
    message = json.loads(open(path).read().split("\n\n", 1)[1])
    if message["alert"]["kind"] == sys.argv[2]: news.append(message["news"])
print(" ".join(news))
P
}
hooks_are() { [ "$(hooks "$1")" = "$2" ]; }
mail_has() { # PATTERN: in the newest mail, decoded
    python3 - "$sink" "$1" <<'P'
import email, glob, re, sys
files = sorted(glob.glob(sys.argv[1] + "/mail.[0-9]*"), key=lambda f: int(f.rsplit(".", 1)[1]))
if not files: sys.exit("no mail")
envelope, mail = open(files[-1], newline="").read().split("\n\n", 1)
message = email.message_from_string(mail)
text = envelope + "\n" + message["Subject"] + "\n" + message.get_payload(decode=True).decode()
sys.exit(0 if re.search(sys.argv[2], text) else text)
P
}
signature_is_right() {
    local sum
    sum=$(sed '1,/^$/d' "$sink/hook.1" | tr -d '\n' | openssl dgst -sha256 -hmac "a secret" | sed 's/.* //')
    grep -q "X-Afterimage-Signature: sha256=$sum" "$sink/hook.1"
}

echo "a secret" >"$run_dir/secret"
echo "pass word" >"$run_dir/password"
refuses "a webhook that is none" "cannot be a webhook" "$afterimage" alert-channel create bad --webhook nonsense
refuses "neither webhook nor mail" "give --webhook" "$afterimage" alert-channel create bad
check "a webhook" ai alert-channel create hook --webhook "http://127.0.0.1:$http_port/secret-path" --secret-file "$run_dir/secret"
check "mail" ai alert-channel create mail --mail-server "smtp://127.0.0.1:$smtp_port" --mail-from dr@example.org --mail-to ops@example.org --mail-to boss@example.org \
    --mail-user me --mail-password-file "$run_dir/password" --mail-allow-plain
check "mail that wants TLS" ai alert-channel create strict --mail-server "smtp://127.0.0.1:$smtp_port" --mail-from dr@example.org --mail-to ops@example.org --severity critical
check "its test button" ai alert-channel test hook
check "the signature is the body's" signature_is_right
check "the test button of mail" ai alert-channel test mail
check "the mail says what it is, to whom, and who sends it" mail_has 'auth me pass word(.|\n)*MAIL FROM:<dr@example.org>(.|\n)*RCPT TO:<ops@example.org>(.|\n)*RCPT TO:<boss@example.org>(.|\n)*Nothing is wrong'
refuses "no TLS, no mail" "cannot deliver.*(TLS|SSL)" "$afterimage" alert-channel test strict
no_secret_shown() { ! { ai alert-channel list; ai alert-channel list --json; ai event list --json; } | grep -E 'a secret|pass word|secret-path'; }
check "no secret is shown" no_secret_shown
check "the channel that cannot is deleted" ai alert-channel delete strict

# --- the recovery point gets older than its target; nobody can be told at first, and the appliance is killed ---------------
ai replication start s --policy all:1h --wait >/dev/null
until_true 60 server_state_is s Replicating || give_up "it does not replicate" "$run_dir/agent.log"
touch "$sink/refuse"
check "the target is set" ai server set-alerts s --rpo-target 2s
kill -STOP "$agent_pid"
check "the newest point is too old: an alert" until_true 40 alert_is recovery-point-age "no 1"
status_says() { ai status | grep -q "ALERT: s: its newest recovery point is of"; }
check "status says so" status_says
channel_waits() { ai alert-channel list | grep -q "^hook .* 1  .*503"; }
check "nobody could be told" until_true 30 channel_waits
kill_now "$appliance_pid"
rm "$sink/refuse"
start_appliance
check "told by the next appliance, once" until_true 60 hooks_are recovery-point-age raised
check "and by mail" until_true 60 mail_has "RCPT TO:<ops@example.org>(.|\n)*warning: s: its newest recovery point is of"
kill -CONT "$agent_pid"
ai server set-alerts s --rpo-target 5m >/dev/null
check "it is over" until_true 90 alert_is recovery-point-age "yes 1"
check "told once more, that it is over" until_true 40 hooks_are recovery-point-age "raised cleared"
check "and by mail, too" until_true 40 mail_has "over: s: its newest recovery point"
check "nothing waits" until_true 20 bash -c '! ai alert-channel list | grep -E "  [1-9][0-9]*  "'

# --- a protected disk is missing ------------------------------------------------------------------------------------------
kill -TERM "$agent_pid" && until_true 30 process_gone "$agent_pid"
start_agent_elsewhere() {
    agent_command
    agent_command+=(--disk "other=$loop_device")
    start "$run_dir/agent.log" "${agent_command[@]}"
    agent_pid=$started_pid
}
start_agent_elsewhere
check "a missing disk: told what is wrong" until_true 40 hooks_are abnormal raised
ai alert list
finish
