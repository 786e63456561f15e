"""transactions.py write DATABASE SECONDS [PAUSE]: commits numbered transactions to an SQLite database in WAL mode, each durable, as fast as it can (or PAUSE
seconds apart), and prints "NUMBER TIME" when one is acknowledged. transactions.py check DATABASE NUMBER: the database is sound and has 1…NUMBER."""
import sqlite3
import sys
import time


def write(path, seconds, pause=0.0):
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = full")
    db.execute("pragma wal_autocheckpoint = 100")
    db.execute("create table t (n integer primary key, filler blob)")
    end = time.time() + seconds
    number = 0
    while time.time() < end:
        number += 1
        db.execute("begin immediate")
        db.execute("insert into t values (?, randomblob(500))", (number,))
        # Pages that were written before are written again.
        db.execute("update t set filler = randomblob(500) where n = ?", (1 + number * 7919 % number,))
        db.execute("commit")
        print(f"{number} {time.time():.6f}", flush=True)
        time.sleep(pause)


def check(path, wanted):
    if wanted == 0:
        return
    db = sqlite3.connect(path)
    sound = db.execute("pragma integrity_check").fetchone()[0]
    newest, count = db.execute("select coalesce(max(n), 0), count(*) from t").fetchone()
    if sound != "ok" or newest < wanted or count != newest:
        sys.exit(f"integrity {sound}, newest {newest}, {count} rows, {wanted} wanted")


if sys.argv[1] == "write":
    write(sys.argv[2], *map(float, sys.argv[3:]))
else:
    check(sys.argv[2], int(sys.argv[3]))
