"""alert-sink.py DIRECTORY: a webhook and a mail server on loopback, for tests. Writes their ports to DIRECTORY/ports ("HTTP SMTP"), each webhook's head and
body to DIRECTORY/hook.N, each mail to DIRECTORY/mail.N. While DIRECTORY/refuse exists, both refuse."""
import base64, http.server, os, socketserver, sys, threading

directory = sys.argv[1]
lock = threading.Lock()
counts = {}


def keep(kind, data):
    with lock:
        counts[kind] = counts.get(kind, 0) + 1
        with open(f"{directory}/{kind}.tmp", "wb") as f:
            f.write(data)
        os.rename(f"{directory}/{kind}.tmp", f"{directory}/{kind}.{counts[kind]}")


def refuses():
    return os.path.exists(f"{directory}/refuse")


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not refuses():
            keep("hook", f"{self.headers}".encode() + body)
        self.send_response(503 if refuses() else 204)
        self.end_headers()

    def log_message(self, *_):
        pass


class Mail(socketserver.StreamRequestHandler):
    def say(self, line):
        self.wfile.write(line.encode() + b"\r\n")

    def handle(self):
        self.say("220 sink")
        envelope = []
        while line := self.rfile.readline().decode().strip():
            verb = line.split(":")[0].split(" ")[0].upper()
            if verb == "EHLO":
                self.say("250-sink")
                self.say("250 AUTH PLAIN")
            elif verb == "AUTH":
                parts = line.split(" ")
                if len(parts) < 3:
                    self.say("334 ")
                    parts.append(self.rfile.readline().decode().strip())
                envelope.append("auth " + base64.b64decode(parts[2]).decode().replace("\0", " ").strip())
                self.say("235 in")
            elif verb in ("MAIL", "RCPT"):
                envelope.append(line)
                self.say("451 later" if refuses() else "250 ok")
            elif verb == "DATA":
                self.say("354 go on")
                data = b""
                while not data.endswith(b"\r\n.\r\n"):
                    data += self.rfile.readline()
                keep("mail", "\n".join(envelope).encode() + b"\n\n" + data)
                self.say("250 kept")
            elif verb == "QUIT":
                self.say("221 bye")
                return
            else:
                self.say("502 what")


http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
mail_server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail)
mail_server.daemon_threads = True
threading.Thread(target=mail_server.serve_forever, daemon=True).start()
with open(f"{directory}/ports.tmp", "w") as f:
    f.write(f"{http_server.server_address[1]} {mail_server.server_address[1]}\n")
os.rename(f"{directory}/ports.tmp", f"{directory}/ports")
http_server.serve_forever()
