"""stamp.py FILE: copies stdin to FILE line by line, each with the time it was received (seconds since 1970) before it."""
import sys, time

with open(sys.argv[1], "ab", buffering=0) as out:
    for line in sys.stdin.buffer:
        out.write(b"%.6f %s\n" % (time.time(), line.rstrip(b"\r\n")))
