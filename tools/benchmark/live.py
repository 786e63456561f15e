"""Rows of the live tap: what it costs whoever writes, and how far behind its points are."""
import measure


def rows(Row, quick):
    seconds = 3 if quick else 10

    def load(what, depth):
        return lambda: measure.figures("live-load.sh", what, seconds, depth)

    made = []
    for depth in (32, 1):
        bare = {"without a tap": load("idle", depth)}
        made.append(Row(f"live-attached-4k-qd{depth}", "IO/s", load("attached", depth), bare, target=0.98))
        made.append(Row(f"live-replicating-4k-qd{depth}", "IO/s", load("replicating", depth), bare, target=0.9))
    made.append(Row("live-point-age-p99", "s", lambda: measure.figures("live-load.sh", "points", 10 if quick else 30), {}, limit=lambda peer: 5.0, bigger=False, rounds=2))
    return made
