"""Servers to measure, and how: fio's nbd engine against a unix socket, one server at a time."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

RUN = os.environ.get("BENCH_RUN", "/tmp")
DEVICE = os.environ.get("BENCH_DEVICE", "")
AFTERIMAGE = os.environ.get("AFTERIMAGE", "afterimage")


class Failed(Exception):
    """A measurement that could not be made; the text says why, for people."""


def die_with_parent():
    """In the child: SIGKILL when this program ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def process(name, command, ready, seconds=20):
    """Runs `command` while the body runs; the body starts when `ready()` is true."""
    log = open(f"{RUN}/{name}.log", "ab")
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)
    try:
        end = time.monotonic() + seconds
        while not ready():
            if child.poll() is not None or time.monotonic() > end:
                tail = open(log.name, errors="replace").read()[-400:].strip()
                raise Failed(f"{name} did not start: {' '.join(command)}: {tail}")
            time.sleep(0.01)
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        log.close()


def answers(path):
    """Whether somebody listens on the unix socket `path`."""
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(path)
            return True
        except OSError:
            return False


SOCKET = f"{RUN}/bench.sock"

SERVERS = {
    "afterimage": lambda: [AFTERIMAGE, "tap", "serve", "--disk", DEVICE, "--socket", SOCKET, "--cut-every", "1000"],
    "afterimage without cuts": lambda: [AFTERIMAGE, "tap", "serve", "--disk", DEVICE, "--socket", SOCKET],
    "afterimage without tracking": lambda: [AFTERIMAGE, "tap", "serve", "--disk", DEVICE, "--socket", SOCKET, "--no-tracking"],
    "qemu-nbd": lambda: ["qemu-nbd", "-f", "raw", "--cache=none", "--aio=io_uring", "-t", "-e", "16", "-k", SOCKET, DEVICE],
    "nbdkit file": lambda: ["nbdkit", "-f", "-U", SOCKET, "--threads", "16", "file", DEVICE, "cache=none"],
    "nbdkit file in memory": lambda: ["nbdkit", "-f", "-U", SOCKET, "--threads", "16", "file", DEVICE],
}


def fio(server, pattern, block, depth, seconds):
    """Runs fio against `server` ("raw device" or a name in SERVERS): (operations/s, MiB/s, p99 in microseconds)."""
    common = ["--name=bench", f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", "--ramp_time=0.5",
              "--norandommap", "--randrepeat=0", "--output-format=json"]
    settle(DEVICE)
    if server == "raw device":
        return run_fio([*common, "--ioengine=io_uring", "--direct=1", f"--filename={DEVICE}"])
    if os.path.exists(SOCKET):
        os.unlink(SOCKET)
    with process(server.replace(" ", "-"), SERVERS[server](), lambda: answers(SOCKET)):
        return run_fio([*common, "--ioengine=nbd", f"--uri=nbd+unix:///?socket={SOCKET}", f"--size={device_bytes()}"])


def settle(device):
    """Puts what the page cache holds of `device` on it and forgets it: a peer that writes into memory must not bill the next one."""
    subprocess.run(["blockdev", "--flushbufs", device], check=True)


def run_fio(arguments):
    done = subprocess.run(["fio", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=RUN, preexec_fn=die_with_parent)
    start = done.stdout.find("{")
    if done.returncode != 0 or start < 0:
        raise Failed(f"fio failed: {(done.stderr or done.stdout).strip()[-300:]}")
    job = json.loads(done.stdout[start:])["jobs"][0]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    return side["iops"], side["bw_bytes"] / 2**20, side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000


def device_bytes():
    return int(subprocess.run(["blockdev", "--getsize64", DEVICE], capture_output=True, text=True, check=True).stdout)


def fill(path, megabytes):
    """Incompressible bytes, written past the page cache, so that nothing is sparse."""
    piece = os.urandom(4 << 20)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for i in range(megabytes // 4):
        os.pwrite(fd, i.to_bytes(8, "little") + piece[8:], i * len(piece))
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def script(name, *arguments, seconds=300):
    """A measurement made by a shell script beside this file; it prints its figure as a line "RESULT number"."""
    return figures(name, *arguments, seconds=seconds)[0]


def figures(name, *arguments, seconds=900):
    """As `script`, with others from its lines "FIGURE name number"."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    child = subprocess.Popen([path, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.terminate()
        output, _ = child.communicate()
        raise Failed(f"{name} took longer than {seconds} s: {output[-300:]}")
    except BaseException:
        child.terminate()
        child.wait()
        raise
    found = re.search(r"^RESULT ([0-9.]+)$", output, re.M)
    if child.returncode != 0 or not found:
        raise Failed(f"{name} failed: {output.strip()[-600:]}")
    return float(found.group(1)), {key: float(value) for key, value in re.findall(r"^FIGURE (\S+) ([0-9.]+)$", output, re.M)}


def nbdcopy_tls(megabytes):
    """MiB/s of nbdcopy from a TLS nbdkit to a file, with its final flush: what a copy without us would take."""
    source, keys, target, port_file = f"{RUN}/sync.img", f"{RUN}/keys.psk", f"{RUN}/copy.img", f"{RUN}/nbdkit.pid"
    with open(keys, "w") as f:
        f.write(f"bench:{os.urandom(32).hex()}\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-P", port_file, "--tls=require", f"--tls-psk={keys}", "file", source]
    try:
        with process("nbdkit-tls", server, lambda: os.path.exists(port_file)):
            started = time.monotonic()
            uri = f"nbds://bench@127.0.0.1:{port}/?tls-psk-file={keys}"
            done = subprocess.run(["nbdcopy", "--flush", uri, target], stdin=subprocess.DEVNULL, capture_output=True, text=True, preexec_fn=die_with_parent)
            took = time.monotonic() - started
        if done.returncode != 0:
            raise Failed(f"nbdcopy failed: {done.stderr.strip()[-300:]}")
        return megabytes / took
    finally:
        for path in (target, port_file):
            if os.path.exists(path):
                os.unlink(path)


def missing():
    """Programs that are needed and not there."""
    names = [n for n in ("fio", "qemu-nbd", "nbdkit", "nbdcopy", "blockdev") if not shutil.which(n)]
    if "fio" not in names and "Name of NBD URI" not in subprocess.run(["fio", "--enghelp=nbd"], capture_output=True, text=True).stdout:
        names.append("fio with its nbd engine")
    return names
