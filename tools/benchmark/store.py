"""The store's rows: what it makes durable, and what is read from and written to what it holds. Ours is `store-bench`, beside the product."""
import functools
import os
import re
import shutil
import subprocess

import measure
from measure import RUN, SOCKET, Failed

STORE_BENCH = os.environ.get("STORE_BENCH", "store-bench")


def tool(command, seconds=1800, stdin=None):
    """Output of a program that must succeed."""
    try:
        done = subprocess.run(command, input=stdin, stdin=None if stdin else subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
                              preexec_fn=measure.die_with_parent)
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} took longer than {seconds} s") from None
    if done.returncode != 0:
        raise Failed(f"{' '.join(command[:6])} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def ours(command, *arguments):
    """Figures of one run of store-bench, by name."""
    output = tool([STORE_BENCH, command, *map(str, arguments)])
    return {name: float(figure) for name, figure in re.findall(r"^RESULT (\w+) ([0-9.]+)$", output, re.M)}


def fresh(name):
    """A path in the run's directory with nothing there, and nothing left to be written from before."""
    path = f"{RUN}/{name}"
    shutil.rmtree(path, ignore_errors=True)
    if os.path.exists(path):
        os.unlink(path)
    os.sync()
    return path


def apply(megabytes, extent_kib):
    path = fresh("apply")
    try:
        return ours("apply", "--directory", path, "--mib", megabytes, "--extent-kib", extent_kib)["mib_per_second"]
    finally:
        shutil.rmtree(path, ignore_errors=True)


def fio_apply(megabytes, engine, depth):
    """MiB/s of fio writing the same amount to a new file beside the store, synced as often."""
    path = fresh("apply.fio")
    try:
        return measure.run_fio(["--name=bench", "--rw=write", "--bs=1m", f"--size={megabytes}m", f"--filename={path}", "--direct=1", "--fdatasync=64", "--end_fsync=1",
                                "--refill_buffers", f"--ioengine={engine}", f"--iodepth={depth}", "--output-format=json"])[1]
    finally:
        fresh("apply.fio")


def seal(figure):
    path = fresh("seal")
    try:
        return ours("seal", "--directory", path)[figure]
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Chain:
    """The same disk after the same writes: 100 layers of a store, a plain file, a qcow2 chain of 100, a qcow2 with 100 snapshots."""

    def __init__(self, megabytes):
        self.megabytes = megabytes
        self.store, self.raw = f"{RUN}/chain.store", f"{RUN}/chain.raw"
        self.top, self.snapshots = f"{RUN}/chain-99.qcow2", f"{RUN}/snapshots.qcow2"

    @functools.cached_property
    def writes(self):
        fresh("chain.store")
        tool([STORE_BENCH, "make-chain", "--directory", self.store, "--raw", self.raw, "--writes", f"{RUN}/chain.writes", "--mib", str(self.megabytes), "--layer-mib", str(self.megabytes // 128)])
        layers = {}
        for line in open(f"{RUN}/chain.writes"):
            layer, offset, length = map(int, line.split())
            layers.setdefault(layer, []).append(f"write -q -P {1 + layer % 255} {offset} {length}\n")
        os.sync()
        return layers

    @functools.cached_property
    def qcow2(self):
        """Makes both."""
        writes = self.writes
        base = f"{RUN}/chain-0.qcow2"
        tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw, base])
        shutil.copyfile(base, self.snapshots)
        for layer, commands in sorted(writes.items()):
            below, here = f"{RUN}/chain-{layer - 1}.qcow2", f"{RUN}/chain-{layer}.qcow2"
            tool(["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", here])
            tool(["qemu-io", "-f", "qcow2", here], stdin="".join(commands))
            tool(["qemu-img", "snapshot", "-c", f"s{layer}", self.snapshots])
            tool(["qemu-io", "-f", "qcow2", self.snapshots], stdin="".join(commands))
        tool(["qemu-img", "snapshot", "-c", "s100", self.snapshots])
        os.sync()
        return True

    def read(self, load):
        self.writes
        return ours("read", "--directory", self.store, *load)

    def read_raw(self, load):
        self.writes
        return ours("read-file", "--file", self.raw, *load)

    def nbd(self, name, command, pattern, block, depth, seconds, figure):
        """fio against a server on the unix socket."""
        if os.path.exists(SOCKET):
            os.unlink(SOCKET)
        with measure.process(name, command, lambda: measure.answers(SOCKET), seconds=60):
            return measure.run_fio(["--name=bench", f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", "--ramp_time=0.5",
                                    "--norandommap", "--randrepeat=0", "--refill_buffers", "--output-format=json", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={SOCKET}",
                                    f"--size={self.megabytes}m"])[figure]

    def serve(self, *more):
        self.writes
        return [STORE_BENCH, "serve", "--directory", self.store, "--socket", SOCKET, *more]

    def qemu_nbd(self, image):
        return ["qemu-nbd", "-f", "qcow2", "--cache=none", "--aio=io_uring", "-t", "-e", "16", "-k", SOCKET, image]

    def overlay(self):
        self.writes
        path = fresh("overlay.qcow2")
        tool(["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.raw, "-F", "raw", path])
        return self.qemu_nbd(path)

    def qemu_img_bench(self, image, block, depth, step, count):
        """Reads per second of qemu-img bench: not random, but `step` bytes apart."""
        output = tool(["qemu-img", "bench", "-f", "qcow2", "-t", "none", "-i", "io_uring", "-c", str(count), "-d", str(depth), "-s", str(block), "-S", str(step), image])
        found = re.search(r"completed in ([0-9.]+) seconds", output)
        if not found:
            raise Failed(f"qemu-img bench said: {output.strip()[-200:]}")
        return count / float(found.group(1))


class Synthetic:
    """A store of many extents, made when first asked for."""

    def __init__(self, name, extents, layers):
        self.path, self.extents, self.layers = f"{RUN}/{name}", extents, layers

    @functools.cached_property
    def made(self):
        fresh(os.path.basename(self.path))
        tool([STORE_BENCH, "make-synthetic", "--directory", self.path, "--extents", str(self.extents), "--layers", str(self.layers)])
        return self.path

    def fork_open(self, figure):
        return ours("fork-open", "--directory", self.made)[figure]

    def large(self):
        """Peak memory; the other figures go along. Compaction changes the store, so it is made anew for every round."""
        figures = ours("large", "--directory", self.made)
        del self.made
        shutil.rmtree(self.path, ignore_errors=True)
        return figures["peak_mib"], figures


def rows(Row, quick):
    seconds = 2 if quick else 6
    megabytes = 256 if quick else 1024
    chain = Chain(megabytes)
    million = Synthetic("million.store", 1_000_000, 24)
    large = Synthetic("large.store", 2_000_000 if quick else 50_000_000, 25)
    made = []

    for name, kib, target in (("64k", 64, 0.9), ("4k", 4, 0.8)):
        made.append(Row(f"store-apply-{name}", "MiB/s", lambda k=kib: apply(megabytes, k),
                        {"fio psync": lambda: fio_apply(megabytes, "psync", 1), "fio io_uring QD8": lambda: fio_apply(megabytes, "io_uring", 8)}, target=target))

    made.append(Row("store-seal-1000", "ms", lambda: seal("seal_ms"), {"write and fdatasync": lambda: seal("bare_ms")}, target=0.5, bigger=False))

    loads = (("4k-qd32", "IO/s", "randread", "4k", 32, 0, ["--bytes", 4096, "--depth", 32], "reads_per_second", 4096, 259 * 4096, 50_000),
             ("1m-seq", "MiB/s", "read", "1m", 8, 1, ["--sequential", "--bytes", 1 << 20, "--depth", 8], "mib_per_second", 1 << 20, 1 << 20, 2048))
    for name, unit, pattern, block, depth, figure, load, result, size, step, count in loads:
        load = [*load, "--seconds", seconds]
        made.append(Row(f"store-read-{name}", unit, lambda l=load, r=result: chain.read(l)[r], {"raw file": lambda l=load, r=result: chain.read_raw(l)[r]}, target=0.9))

        def served(server, command, p=pattern, b=block, d=depth, f=figure):
            return lambda: chain.nbd(server, command(), p, b, d, seconds, f)

        def bench(image, s=size, d=depth, t=step, c=count):
            return lambda: chain.qcow2 and chain.qemu_img_bench(image(), s, d, t, c // (10 if quick else 1))
        made.append(Row(f"store-read-{name}-nbd", unit, served("store", lambda: chain.serve()), {
            "qemu-nbd, chain of 100": served("qemu-nbd-chain", lambda: chain.qcow2 and chain.qemu_nbd(chain.top)),
            "qemu-nbd, 100 snapshots": served("qemu-nbd-snapshots", lambda: chain.qcow2 and chain.qemu_nbd(chain.snapshots)),
            "qemu-img bench, chain of 100": bench(lambda: chain.top),
            "qemu-img bench, 100 snapshots": bench(lambda: chain.snapshots)}, rounds=3))

    def written(server, command):
        return lambda: chain.nbd(server, command(), "randwrite", "4k", 32, seconds, 0)
    made.append(Row("fork-write-4k", "IO/s", written("fork", lambda: chain.serve("--fork")), {"qcow2 overlay": written("qemu-nbd-overlay", chain.overlay)}, target=1.0))

    for name, unit, figure, most in (("fork-open-cached", "ms", "cached_ms", 100), ("fork-open-cold", "s per million extents", "cold_seconds_per_million", 1),
                                     ("fork-open-memory", "bytes per extent", "bytes_per_extent", 32)):
        made.append(Row(name, unit, lambda f=figure: million.fork_open(f), {}, bigger=False, limit=lambda _, m=most: m, rounds=3))
    made.append(Row("store-large", "MiB at most", large.large, {}, bigger=False, limit=lambda _: 4096, rounds=1))
    return made
