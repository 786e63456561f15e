"""Run in a machine: tries to get a packet out of its network, in every way that it knows. Its arguments are addresses to try: the host, and others.
Prints "reached NAME" for whatever answered. That nothing left is for whoever watches outside to say."""
import random
import socket
import struct
import sys


def quietly(attempt):
    try:
        return attempt()
    except OSError:
        return None


def cards():
    for name in (x[1] for x in socket.if_nameindex()):
        if name != "lo":
            yield name, bytes.fromhex(open(f"/sys/class/net/{name}/address").read().strip().replace(":", ""))


def frame(card, mac, target, kind, payload):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((card, 0))
        raw.send(target + mac + struct.pack(">H", kind) + payload)


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ip(source, target, protocol, payload):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), random.randrange(65536), 0, 64, protocol, 0, socket.inet_aton(source), socket.inet_aton(target))
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def below_the_system(card, mac, target):
    """Frames of its own making: ARP for the target, DHCP to all, ping, UDP and TCP to the target behind whatever router there may be."""
    everybody = b"\xff" * 6
    for source in ("0.0.0.0", "10.0.2.15", "10.99.0.77"):
        frame(card, mac, everybody, 0x0806, struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, socket.inet_aton(source), b"\0" * 6, socket.inet_aton(target)))
    discover = struct.pack(">BBBBIHHIIII16s64s128sI", 1, 1, 6, 0, random.randrange(1 << 32), 0, 0x8000, 0, 0, 0, 0, mac.ljust(16, b"\0"), b"", b"", 0x63825363) + b"\x35\x01\x01\xff"
    frame(card, mac, everybody, 0x0800, ip("0.0.0.0", "255.255.255.255", 17, struct.pack(">HHHH", 68, 67, 8 + len(discover), 0) + discover))
    echo = struct.pack(">BBHHH", 8, 0, 0, 1, 1) + b"outside?"
    echo = echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]
    datagram = struct.pack(">HHHH", 4000, 7777, 8 + 8, 0) + b"outside?"
    opening = struct.pack(">HHIIBBHHH", 4001, 7777, 1, 0, 0x50, 2, 8192, 0, 0)
    for protocol, payload in ((1, echo), (17, datagram), (6, opening)):
        for mac_of_router in (everybody, bytes.fromhex("525500000202"), bytes.fromhex("52550a000202")):
            frame(card, mac, mac_of_router, 0x0800, ip("10.0.2.15", target, protocol, payload))


def through_the_system(target):
    for port in (22, 53, 80, 7777):
        if quietly(lambda: opens(target, port)):
            print(f"reached {target}:{port} by TCP")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(1)
            question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01"
            quietly(lambda: s.sendto(question, (target, port)))
            answer = quietly(lambda: s.recvfrom(512))
            if answer:
                print(f"reached {target}:{port} by UDP")


def opens(target, port):
    with socket.create_connection((target, port), timeout=2):
        return True


for target in sys.argv[1:]:
    for card, mac in cards():
        quietly(lambda: below_the_system(card, mac, target))
    through_the_system(target)
print("tried")
