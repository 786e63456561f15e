"""Rows of the live tap: what it costs whoever writes, and how far behind its points are."""
import measure


def rows(Row, quick):
    seconds = 3 if quick else 10

    def load(what, depth, times=1):
        return lambda: measure.figures("live-load.sh", what, seconds * times, depth)

    made = []
    for depth in (32, 1):
        bare = {"without a tap": load("idle", depth)}
        made.append(Row(f"live-attached-4k-qd{depth}", "IO/s", load("attached", depth), bare, target=0.98))
        # Longer than the patience, so that what is read when a point is overdue is in it.
        longer = {"without a tap": load("idle", depth, 7)}
        made.append(Row(f"live-replicating-4k-qd{depth}", "IO/s", load("replicating", depth, 7), longer, target=0.9, rounds=2))
    made.append(Row("live-greedy-4k-qd32", "IO/s", load("greedy", 32), {"without a tap": load("idle", 32)}, rounds=3))
    made.append(Row("live-point-age-p99", "s", lambda: measure.figures("live-load.sh", "points", 10 if quick else 30), {}, limit=lambda peer: 5.0, bigger=False, rounds=2))
    made.append(Row("live-freeze-median", "ms", lambda: measure.figures("live-load.sh", "freezes", 10 if quick else 30), {}, limit=lambda peer: 50.0, bigger=False, rounds=2))
    made.append(Row("live-idle-cpu", "% of a core per TiB", lambda: measure.figures("live-load.sh", "quiet", 10 if quick else 30), {}, limit=lambda peer: 0.5, bigger=False, rounds=2))
    return made
