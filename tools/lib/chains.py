"""Dependent writes through NBD, and what must be true of any image that they ended up in; for tests that change sides while somebody writes.

chains.py write SOCKET EXPORT LOG [--chains N]   until SIGTERM: each chain issues a write only when the one before it was acknowledged; goes on where LOG ends,
                                                 and reconnects when the server is away. Then "writes=N"
chains.py check IMAGE LOG [--all] [--forget]     of each chain, IMAGE holds its first so many writes and none of the others. --all: every acknowledged one. Prints
                                                 "chains=N newest=N lost=N" (lost: acknowledged, and not there). --forget: LOG becomes what IMAGE holds

LOG is one text file per chain: a line "SEQUENCE BLOCK" before each write is issued, "SEQUENCE ok" when it was acknowledged. A block holds the
chain's number and the write's sequence number, over and over. The chain owns every so-many-th stripe of 16 blocks.
"""
import argparse
import os
import random
import signal
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from nbd import NBD  # noqa: E402

BLOCK, STRIPE = 4096, 16
ended = threading.Event()


def log_path(log, chain):
    return f"{log}.{chain}"


def read_log(log, chain):
    """The chain's blocks by write, and how many of the writes were acknowledged."""
    blocks, acknowledged = [], 0
    if os.path.exists(log_path(log, chain)):
        with open(log_path(log, chain)) as file:
            for line in file:
                sequence, what = line.split()
                if what == "ok":
                    acknowledged = int(sequence)
                elif int(sequence) == len(blocks) + 1:  # another line of the same: issued again
                    blocks.append(int(what))
    return blocks, acknowledged


def own_blocks(total, chain, chains):
    return [b for b in range(total) if b // STRIPE % chains == chain]


def stamp(chain, sequence):
    return struct.pack("<QQ", chain + 1, sequence) * (BLOCK // 16)


def run_chain(asked, chain, counts):
    blocks, acknowledged = read_log(asked.log, chain)
    sequence, client, own, chosen = acknowledged, None, None, random.Random()
    with open(log_path(asked.log, chain), "a", buffering=1) as log:
        while not ended.is_set():
            try:
                client = client or NBD(asked.socket, asked.export)
                own = own or own_blocks(client.size // BLOCK, chain, asked.chains)
                if sequence == acknowledged:
                    sequence += 1
                    if sequence > len(blocks):
                        # A quarter goes to a few hot blocks, as a log's would.
                        blocks.append(own[chosen.randrange(8 if chosen.random() < 0.25 else len(own))])
                        log.write(f"{sequence} {blocks[-1]}\n")
                client.write(blocks[sequence - 1] * BLOCK, stamp(chain, sequence))
                if sequence % 16 == 0:
                    client.flush()
                acknowledged = sequence
                log.write(f"{sequence} ok\n")
                counts[chain] += 1
                time.sleep(0.001)
            except (OSError, RuntimeError):
                client = None
                time.sleep(0.05)
    if client:
        client.flush()
        client.close()


def write(asked):
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    counts = [0] * asked.chains
    threads = [threading.Thread(target=run_chain, args=(asked, chain, counts)) for chain in range(asked.chains)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"writes={sum(counts)}", flush=True)
    return 0


def check_chain(image, total, asked, chain):
    """The newest write that is there, and how many acknowledged ones are not."""
    blocks, acknowledged = read_log(asked.log, chain)
    found = {}
    for block in own_blocks(total, chain, asked.chains):
        image.seek(block * BLOCK)
        data = image.read(BLOCK)
        owner, sequence = struct.unpack_from("<QQ", data)
        if owner == 0 and sequence == 0:
            continue
        if owner != chain + 1 or data != stamp(chain, sequence) or not 0 < sequence <= len(blocks):
            raise ValueError(f"chain {chain}, block {block}: it holds what was never written there (chain {owner - 1}, write {sequence})")
        found[block] = sequence
    newest = max(found.values(), default=0)
    expected = {block: n + 1 for n, block in enumerate(blocks[:newest])}
    for block in expected.keys() | found.keys():
        if expected.get(block) != found.get(block):
            raise ValueError(f"chain {chain}, block {block}: it holds write {found.get(block)} where write {expected.get(block)} was acknowledged before write {newest}, which is there")
    lost = max(0, acknowledged - newest)
    if asked.all and lost:
        raise ValueError(f"chain {chain}: write {acknowledged} was acknowledged, the newest here is {newest}")
    if asked.forget:
        with open(log_path(asked.log, chain), "w") as log:
            for n, block in enumerate(blocks[:newest]):
                log.write(f"{n + 1} {block}\n{n + 1} ok\n")
    return newest, lost


def check(asked):
    with open(asked.image, "rb") as image:
        total = image.seek(0, os.SEEK_END) // BLOCK
        try:
            verdicts = [check_chain(image, total, asked, chain) for chain in range(asked.chains)]
        except ValueError as error:
            print(error)
            return 1
    print(f"chains={asked.chains} newest={max(n for n, _ in verdicts)} lost={sum(lost for _, lost in verdicts)}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    writing, checking = commands.add_parser("write"), commands.add_parser("check")
    writing.add_argument("socket")
    writing.add_argument("export")
    writing.add_argument("log")
    checking.add_argument("image")
    checking.add_argument("log")
    checking.add_argument("--all", action="store_true")
    checking.add_argument("--forget", action="store_true")
    for command in (writing, checking):
        command.add_argument("--chains", type=int, default=4)
    asked = parser.parse_args()
    return write(asked) if asked.what == "write" else check(asked)


if __name__ == "__main__":
    sys.exit(main())
