"""A small NBD client of our own, for tests: what other people's clients would not do is done here.

nbd.py write SOCKET EXPORT [--seed N]   random writes until SIGTERM, reconnecting when the server is away; then a flush and
                                        "writes=N interruptions=N" on stdout
nbd.py stamp SOCKET EXPORT OFFSET TEXT  one write of TEXT (padded to 512 bytes) and a flush
"""
import argparse
import os
import random
import signal
import socket
import struct
import sys
import time

# Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
OPT_GO, REP_ACK, REP_INFO, INFO_EXPORT = 7, 1, 3, 0


class NBD:
    def __init__(self, path, export, timeout=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
        if magic != 0x4E42444D41474943 or option_magic != 0x49484156454F5054 or not flags & 1:
            raise OSError("not a fixed newstyle NBD server")
        self.socket.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.socket.sendall(struct.pack(">QII", option_magic, OPT_GO, len(body)) + body)
        self.size = None
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            data = self.receive(length)
            if kind == REP_ACK:
                break
            if kind & 0x80000000:
                raise OSError(f"export {export!r} was refused: {data.decode(errors='replace')}")
            if kind == REP_INFO and struct.unpack(">H", data[:2])[0] == INFO_EXPORT:
                self.size, self.flags = struct.unpack(">QH", data[2:12])
        self.cookie = 0

    def receive(self, count):
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise OSError("the server closed the connection")
            data += piece
        return bytes(data)

    def request(self, kind, offset=0, length=0, payload=b"", answer=0):
        self.cookie += 1
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, self.cookie, offset, length) + payload)
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        if magic != 0x67446698 or cookie != self.cookie:
            raise OSError("a reply that is none")
        if error:
            raise RuntimeError(f"the server answered with error {error} ({os.strerror(error)})")
        return self.receive(answer)

    def write(self, offset, data):
        self.request(WRITE, offset, len(data), data)

    def read(self, offset, length):
        return self.request(READ, offset, length, answer=length)

    def flush(self):
        self.request(FLUSH)

    def close(self):
        try:
            self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0))
        except OSError:
            pass
        self.socket.close()


def keep_writing(path, export, seed):
    chosen, ended = random.Random(seed), False

    def end(*_):
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    writes, interruptions, client = 0, 0, None
    while not ended or client is None:
        try:
            client = client or NBD(path, export)
            size = 4096 * chosen.choice([1, 1, 1, 2, 8, 16])
            # Most writes go to a small hot part: those are the ones that collide with draining.
            area = client.size if chosen.random() < 0.3 else min(client.size, 4 << 20)
            client.write(chosen.randrange((area - size) // 512) * 512, chosen.randbytes(size))
            writes += 1
            time.sleep(0.002)
        except OSError:
            interruptions += client is not None
            client = None
            time.sleep(0.05)
            if ended and not os.path.exists(path):
                break
    if client:
        client.flush()
        client.close()
    print(f"writes={writes} interruptions={interruptions}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "stamp"])
    parser.add_argument("socket")
    parser.add_argument("export")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if asked.what == "write":
        keep_writing(asked.socket, asked.export, asked.seed)
    else:
        client = NBD(asked.socket, asked.export)
        client.write(int(asked.rest[0]), asked.rest[1].encode().ljust(512, b"\0"))
        client.flush()
        client.close()


if __name__ == "__main__":
    sys.exit(main())
