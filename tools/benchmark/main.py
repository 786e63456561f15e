"""bench [--quick] [--list] [--json FILE] [ROW...]

Each row runs ours and its peers in turn, several rounds, the order turned around each time, and prints medians, spread (highest
minus lowest, in percent of the median) and the ratio. ROW: a row's name, or a part of names. Exit code 1 when a row with a
target does not meet it or could not be measured."""
import argparse
import json
import statistics
import sys

import api
import live
import measure
import recovery
import store
from measure import Failed


class Row:
    """One comparison. `ours` and each of `peers` (name -> function) measure once; the best peer counts. `bigger` says which way
    is better; the ratio is always "above 1 is better for us". `limit` gives the target from the peer's median, for rows whose
    target is no ratio; those may have no peer. `ours` may return its figure with a dict of others, which go into the JSON."""

    def __init__(self, name, unit, ours, peers, target=None, bigger=True, limit=None, prepare=None, rounds=None):
        self.name, self.unit, self.ours, self.peers = name, unit, ours, peers
        self.target, self.bigger, self.limit, self.prepare, self.rounds = target, bigger, limit, prepare, rounds

    def measure(self, rounds):
        if self.prepare:
            self.prepare()
        contestants = {"ours": self.ours, **self.peers}
        figures = {name: [] for name in contestants}
        more = {}
        for number in range(min(rounds, self.rounds or rounds)):
            names = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
            for name in names:
                figure = contestants[name]()
                if isinstance(figure, tuple):
                    figure, beside = figure
                    for key, value in beside.items():
                        more.setdefault(key if name == "ours" else f"{name}: {key}", []).append(value)
                figures[name].append(figure)
                note(f"{self.name}: round {number + 1}, {name} {figures[name][-1]:,.2f} {self.unit}")
        medians = {name: statistics.median(values) for name, values in figures.items()}
        ours = medians.pop("ours")
        peer_name = (max if self.bigger else min)(medians, key=medians.get) if medians else None
        peer = medians.get(peer_name)
        ratio = None if peer is None else ours / peer if self.bigger else peer / ours
        target = self.limit(peer) if self.limit else self.target
        met = None if target is None else (ours <= target if self.limit else ratio >= target)
        result = {"name": self.name, "unit": self.unit, "ours": round(ours, 3), "peer": rounded(peer), "peerName": peer_name,
                  "ratio": rounded(ratio), "target": rounded(target), "met": met, "spread": {name: spread(values) for name, values in figures.items()}}
        if len(medians) > 1:
            result["peers"] = {name: round(median, 3) for name, median in medians.items()}
        if more:
            result["figures"] = {name: round(statistics.median(values), 3) for name, values in more.items()}
        return result


def rounded(figure):
    return None if figure is None else round(figure, 3)


def spread(values):
    return round(100 * (max(values) - min(values)) / statistics.median(values), 1)


def note(text):
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}", end="", file=sys.stderr, flush=True)


def rows(quick):
    seconds = 2 if quick else 6
    iops, mebibytes = 0, 1

    def io(server, pattern, block, depth, figure):
        return lambda: measure.fio(server, pattern, block, depth, seconds)[figure]

    made = []
    for pattern, label in (("randread", "read"), ("randwrite", "write")):
        for depth in (32, 1):
            def run(server, p=pattern, d=depth):
                return io(server, p, "4k", d, iops)
            name = f"{label}-4k-qd{depth}"
            servers = {s: run(s) for s in ("qemu-nbd", "nbdkit file")}
            made.append(Row(f"tap-{name}", "IO/s", run("afterimage"), servers, target=1.0 if depth == 32 else None))
            made.append(Row(f"tap-{name}-raw", "IO/s", run("afterimage"), {"raw device": run("raw device")}))
            made.append(Row(f"tap-{name}-memory", "IO/s", run("afterimage"), {"nbdkit file in memory": run("nbdkit file in memory")}))
    for pattern, label in (("read", "read"), ("write", "write")):
        def run(server, p=pattern):
            return io(server, p, "1m", 8, mebibytes)
        made.append(Row(f"tap-{label}-1m", "MiB/s", run("afterimage"), {s: run(s) for s in ("qemu-nbd", "nbdkit file")}))
        made.append(Row(f"tap-{label}-1m-raw", "MiB/s", run("afterimage"), {"raw device": run("raw device")}))
    for pattern, depth, target in (("randwrite", 32, 0.95), ("randwrite", 1, None), ("randread", 32, None)):
        label = pattern.removeprefix("rand")
        bare = {"without tracking": io("afterimage without tracking", pattern, "4k", depth, iops)}
        made.append(Row(f"tracking-{label}-4k-qd{depth}", "IO/s", io("afterimage without cuts", pattern, "4k", depth, iops), bare, target=target))
        made.append(Row(f"cuts-{label}-4k-qd{depth}", "IO/s", io("afterimage", pattern, "4k", depth, iops), bare, target=target))

    megabytes = 512 if quick else 2048
    made.append(Row("full-sync", "MiB/s", lambda: megabytes / measure.script("full-sync.sh", f"{measure.RUN}/sync.img"),
                    {"nbdcopy over TLS": lambda: measure.nbdcopy_tls(megabytes)}, target=1.5,
                    prepare=lambda: measure.fill(f"{measure.RUN}/sync.img", megabytes), rounds=3))
    made.append(Row("rto", "s", lambda: measure.script("failover.sh"), {"plain QEMU boot": lambda: measure.script("plain-boot.sh")},
                    bigger=False, limit=lambda peer: peer + 2.0, rounds=3))
    return made + live.rows(Row, quick) + recovery.rows(Row, quick) + store.rows(Row, quick) + api.rows(Row, quick)


def main():
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs and fewer rounds: a look, not a measurement")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to run (a name, or a part of names); all without it")
    asked = parser.parse_args()
    table = rows(asked.quick)
    for word in asked.rows:
        if not any(word in row.name for row in table):
            parser.error(f"there is no row {word} (--list shows them)")
    if asked.rows:
        exact = [row for row in table if row.name in asked.rows]
        words = [word for word in asked.rows if word not in {row.name for row in table}]
        table = exact + [row for row in table if row not in exact and any(word in row.name for word in words)]
    if asked.list:
        print("\n".join(row.name for row in table))
        return 0
    if gone := measure.missing():
        parser.error(f"missing: {', '.join(gone)}")

    measure.fill(measure.DEVICE, measure.device_bytes() >> 20)
    results, failed = [], 0
    print(f"{'row':<28} {'ours':>12} {'spread':>7}   {'peer':>12} {'spread':>7} {'ratio':>6}  {'target':>7}")
    for row in table:
        try:
            result = row.measure(2 if asked.quick else 5)
        except Failed as error:
            failed += 1
            note("")
            print(f"{row.name:<28} not measured: {error}")
            results.append({"name": row.name, "unit": row.unit, "ours": None, "peer": None, "peerName": None, "ratio": None, "target": row.target, "met": False})
            continue
        note("")
        if sys.stderr.isatty():
            print("\r", end="")
        failed += result["met"] is False
        target = "" if result["target"] is None else f"{result['target']:.2f}{' s' if row.unit == 's' else ''} {'met' if result['met'] else 'MISSED'}"
        line = f"{row.name:<28} {result['ours']:>12,.1f} {result['spread']['ours']:>6.0f}%   "
        if result["peer"] is None:
            line += f"{'':>12} {'':>7} {'':>6}  {target:<12} {row.unit}"
        else:
            line += (f"{result['peer']:>12,.1f} {result['spread'][result['peerName']]:>6.0f}% {result['ratio']:>6.2f}  {target:<12} "
                     f"{row.unit}, {result['peerName']}")
        print(line, flush=True)
        for name, figure in {**result.get("peers", {}), **result.get("figures", {})}.items():
            print(f"{'':<28} {figure:>12,.1f} {name}", flush=True)
        results.append(result)
    if asked.json:
        with open(asked.json, "w") as out:
            json.dump(results, out, indent=2)
            out.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
