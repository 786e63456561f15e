"""Rows of recovery machines: how soon they run, how fast they read, and what they cost whoever is protected."""
import measure


class Paired:
    """Two figures of one run of a script: whichever is asked for first runs it, the other is what came of it."""

    def __init__(self, other, *command):
        self.other, self.command, self.left = other, command, {}

    def side(self, name):
        def take():
            if name not in self.left:
                result, more = measure.figures(*self.command, seconds=600)
                self.left = {"result": (result, more), "other": more[self.other]}
            return self.left.pop(name)
        return take


def rows(Row, quick):
    def rto(size, *disk):
        def ours(layers):
            return lambda: measure.figures("failover.sh", "--size", size, *disk, "--layers", layers, seconds=2700)
        plain = {"plain QEMU boot": lambda: measure.script("plain-boot.sh", "--size", size, *disk)}
        label = "1t" if disk else "1g"
        return [Row(f"rto-{label}-{layers}-layers", "s", ours(layers), plain, bigger=False, limit=lambda peer: peer + 1.0, rounds=1 if quick else 3)
                for layers in (1, 100)]

    def boot():
        return measure.figures("failover.sh")[1]["boot-s"]

    made = rto(1024) + rto(1024, "--disk", "1T")
    made.append(Row("boot-io", "s", boot, {"plain QEMU boot": lambda: measure.script("plain-boot.sh")}, target=1 / 1.05, bigger=False, rounds=5))
    pair = Paired("before-iops", "drill-beside.sh", 6 if quick else 20)
    made.append(Row("drill-beside-iops", "IO/s", pair.side("result"), {"before the drill": pair.side("other")}, target=0.95, rounds=3))
    made.append(Row("ten-machines", "s", lambda: measure.figures("ten-machines.sh"), {}, bigger=False, rounds=3))
    back = Paired("full-sync-s", "failback.sh", *((512, 12) if quick else (4096, 100)))
    made.append(Row("failback-delta", "s", back.side("result"), {"full sync": back.side("other")}, bigger=False, limit=lambda peer: peer / 10, rounds=3))
    return made
