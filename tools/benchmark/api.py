"""Rows of the API: how long its answers take with 200 servers of 1,000 recovery points each in store and catalogue."""
import functools
import http.client
import json
import os
import sqlite3
import ssl
import statistics
import subprocess
import time
from datetime import datetime, timedelta, timezone

import measure
from measure import AFTERIMAGE, RUN, Failed
from store import STORE_BENCH, fresh, tool

LISTS = {"status": "/v1/status", "servers": "/v1/servers", "recovery-points": "/v1/servers/server-100/recovery-points", "tasks": "/v1/tasks?limit=1000",
         "events": "/v1/events?limit=1000", "alerts": "/v1/alerts?all=true&limit=1000", "exports": "/v1/exports", "mounts": "/v1/mounts"}


class Client:
    """One connection that is kept."""

    def __init__(self, state):
        profile = json.load(open(f"{state}/client.json"))
        self.token = profile["token"]
        host, port = profile["url"].removeprefix("https://").split(":")
        self.connection = http.client.HTTPSConnection(host, int(port), context=ssl.create_default_context(cafile=profile["caFile"]))

    def ask(self, method, path, body=None):
        self.connection.request(method, path, body and json.dumps(body), {"Authorization": f"Bearer {self.token}"})
        answer = self.connection.getresponse()
        data = answer.read()
        if answer.status >= 300:
            raise Failed(f"{method} {path} was answered {answer.status}: {data[:300]}")
        return data


class Fleet:
    """An appliance with many servers, made when first asked for."""

    def __init__(self, servers, points):
        self.servers, self.points = servers, points
        self.state, self.store, self.runtime = f"{RUN}/fleet", f"{RUN}/fleet.store", f"{RUN}/fleet.run"

    def appliance(self):
        """Its profile is written when it listens."""
        profile = f"{self.state}/client.json"
        if os.path.exists(profile):
            os.utime(profile, (0, 0))
        command = [AFTERIMAGE, "appliance", "--state", self.state, "--store", self.store, "--runtime-dir", self.runtime, "--listen", "127.0.0.1:0", "--link", "127.0.0.1:0", "--scrub-rate", "0"]
        return measure.process("fleet", command, lambda: os.path.exists(profile) and os.stat(profile).st_mtime > 0, seconds=600)

    @functools.cached_property
    def made(self):
        for name in ("fleet", "fleet.store", "fleet.run"):
            fresh(name)
        with self.appliance():
            client = Client(self.state)
            client.ask("POST", "/v1/site-pairs", {"name": "pair", "type": "zone-to-zone", "primarySite": "a", "secondarySite": "b"})
            for first in range(0, self.servers, 10):
                client.ask("POST", "/v1/servers", {"sitePair": "pair", "names": [f"server-{n}" for n in range(first, min(first + 10, self.servers))]})
        self.catalogue()
        tool([STORE_BENCH, "make-servers", "--directory", self.store, "--groups", f"{RUN}/fleet.groups", "--points", str(self.points)])
        return True

    def catalogue(self):
        """Servers that replicated a year: their tasks, audit log, alerts, and how each point was proven."""
        now = datetime.now(timezone.utc)

        def text(seconds_ago):
            return (now - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%d %H:%M:%S.000")

        settings = json.dumps({"disks": ["vda"], "epochMilliseconds": 1000, "throttleBytesPerSecond": 0, "automaticRestart": True, "cpus": 2, "memoryMiB": 1024})
        disks = json.dumps([{"name": "vda", "devicePath": "/dev/vda", "tap": "live", "geometry": {"sizeBytes": 1 << 30, "logicalBlockBytes": 512, "preferredBlockBytes": 4096}}])
        proof = json.dumps({"method": "rounds", "consistency": 0, "roundCount": 2, "collisionCount": 3, "freezeMilliseconds": 0})
        with sqlite3.connect(f"{self.state}/catalogue.sqlite") as db:
            rows = db.execute("SELECT id, name FROM server").fetchall()
            db.execute("UPDATE server SET state = 'Replicating', settings = ?, disks = ?, policy = 'keep-all'", (settings, disks))
            for server, name in rows:
                db.executemany("INSERT INTO pointProof VALUES (?, 'bench', ?, ?)", ((server, epoch, proof) for epoch in range(1, self.points + 1)))
                for number in range(50):
                    task = db.execute("INSERT INTO task (server, serverName, operation, parameters, status, result, who, created, finished) VALUES (?, ?, 'Disaster Recovery Drill', '{}', 'succeeded', ?, 'ops', ?, ?)",
                                      (server, name, json.dumps({"message": "the machine runs", "rtoSeconds": 4.2}), text(number * 604800), text(number * 604800 - 5))).lastrowid
                    db.executemany("INSERT INTO taskLog (task, time, line) VALUES (?, ?, 'a line of its log, as long as most of them')", [(task, text(number * 604800))] * 8)
                db.executemany("INSERT INTO event (time, who, what, server, before, after) VALUES (?, 'agent', 'link lost', ?, 'Replicating', 'Replication Interrupted')", [(text(n * 86400), name) for n in range(250)])
                db.executemany("INSERT INTO alert (kind, severity, subject, text, raised, cleared) VALUES ('interrupted', 'critical', ?, 'nothing of it arrives', ?, ?)", [(name, text(n * 604800), text(n * 604800 - 60)) for n in range(20)])
        with open(f"{RUN}/fleet.groups", "w") as out:
            out.writelines(f"{server}\n" for server, _ in rows)

    def times(self, count, path):
        """Milliseconds of the slowest but one of a hundred, with the median; the first answer, which fills caches, is one of them."""
        self.made
        with self.appliance():
            client, took = Client(self.state), []
            for _ in range(count):
                started = time.monotonic()
                size = len(client.ask("GET", path))
                took.append((time.monotonic() - started) * 1000)
        return self.worst(took), {"median_ms": statistics.median(took), "answer_kib": size / 1024}

    def command(self, count):
        """The same of `afterimage status` from its start to its end."""
        self.made
        with self.appliance():
            took = []
            for _ in range(count):
                started = time.monotonic()
                subprocess.run([AFTERIMAGE, "status", "--profile", f"{self.state}/client.json"], stdout=subprocess.DEVNULL, check=True, preexec_fn=measure.die_with_parent)
                took.append((time.monotonic() - started) * 1000)
        return self.worst(took), {"median_ms": statistics.median(took)}

    @staticmethod
    def worst(took):
        return sorted(took)[max(0, round(len(took) * 0.99) - 1)]


def rows(Row, quick):
    fleet = Fleet(20 if quick else 200, 1000)
    count = 50 if quick else 300

    def below(most):
        return lambda peer: most
    made = [Row(f"api-{name}", "ms", lambda p=path.replace("server-100", f"server-{fleet.servers // 2}"): fleet.times(count, p), {}, bigger=False, limit=below(200), rounds=3) for name, path in LISTS.items()]
    made.append(Row("cli-status", "ms", lambda: fleet.command(count // 10), {}, bigger=False, rounds=3))
    return made
