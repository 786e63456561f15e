import CLiveTap
import Glibc

/// The baseline of a disk: the kernel's completed sectors minus `issued` of ours, as if nothing were in flight. It must never be too high: a write that was
/// missed would make up for the difference. Too low, it is a false alarm.
///
/// What is in slots is in flight, or has ended unseen, and only the first belongs to it. So either
///
/// - every slot that was in use at an earlier look has been freed since, and no write has ended unseen in between (the kernel's completed sectors grew by those that were
///   seen): then all that is in slots now was issued in between, and is in flight. That twice in a row, with the same result: so what was in flight the
///   first time has ended as it should;
/// - or the driver has no write, also after every processor has left what it was in: then nothing in slots is in flight.
///
/// Where neither is found there is no baseline, nothing is proven, and it is tried again; what was written meanwhile counts as missed.
extension LiveReconciliation {
    static let settleNanoseconds: UInt64 = 5_000_000_000
    static let baselineNanoseconds: UInt64 = 500_000_000

    /// After attaching: waits until every write that was in flight before is known to have ended (all tags seen, or nothing in flight),
    /// five seconds at most, then takes the baselines.
    func settle() {
        let deadline = Self.now() + Self.settleNanoseconds
        for index in disks.indices {
            while !maps.isEveryTagSeen(disk: index), disks[index].statistics.writesInFlight() != 0, Self.now() < deadline {
                useTags(index, of: Array(0..<disks[index].queueCount), until: deadline)
                usleep(1000)
            }
            maps.disks[index].is_calibrated = 0
        }
        forgive()
    }

    /// Nothing was missed from here on: everything is compared that was written before.
    func forgive() {
        let limit = Self.now() + 2 * Self.baselineNanoseconds
        // First those that have none: the others may take all the time there is. With one of them left everything is compared once more (`retakeBaselines`).
        let order = disks.indices.filter { maps.disks[$0].is_calibrated == 0 } + disks.indices.filter { maps.disks[$0].is_calibrated != 0 }
        for index in order {
            let disk = maps.disks + index
            // Also of one that has a baseline: of what was missed besides there need be no other resync. If it cannot be had now, the old one is as good.
            takeBaseline(index, until: min(limit, Self.now() + (disk.pointee.is_calibrated == 0 ? Self.baselineNanoseconds : Self.baselineNanoseconds / 10)))
            disk.pointee.baseline_unmatched = disk.pointee.unmatched
            disk.pointee.baseline_undescribed = disk.pointee.undescribed
        }
    }

    /// Whether it was taken; if not, nothing changes.
    @discardableResult
    func takeBaseline(_ index: Int, until deadline: UInt64) -> Bool {
        let disk = maps.disks + index, statistics = disks[index].statistics
        guard statistics.isKept else { return false }
        var before: Look?
        /// What a pair of looks gave, and whether every processor has moved on since.
        var found: Int64?
        var haveProcessorsPassed = false
        var inUse: [LiveTapMaps.SlotInUse] = []
        var turn = 0
        func keep(_ baseline: Int64) -> Bool {
            guard statistics.isKept else { return false }
            disk.pointee.baseline_sectors = baseline
            disk.pointee.is_calibrated = 1
            return true
        }
        while Self.now() < deadline {
            inUse.removeAll { !maps.isInUse($0) }
            if inUse.isEmpty {
                let look = look(index)
                guard look.isSharp else { continue }
                let baseline = disk.pointee.baseline_sectors + look.excess
                if faults.contains(.trustSlots) { return keep(baseline) }
                if let before, before.unseen == look.unseen, before.requeued == look.requeued {
                    if baseline == found, haveProcessorsPassed { return keep(baseline) }
                    if baseline != found { (found, haveProcessorsPassed) = (baseline, false) }
                }
                before = look
                // After the look: what has ended unseen before it and is still in its slot must be among these.
                let slots = maps.slotsInUse(disk: index)
                inUse = slots.inUse
                if found != nil, !haveProcessorsPassed {
                    // A program may stand still between a slot that it has freed and the sum of them; not if the sum is theirs.
                    if look.slots != slots.sectors || look.events != events(index) { Self.letProcessorsPass() }
                    haveProcessorsPassed = true
                }
                continue
            }
            if let look = quietLook(index) { return keep(disk.pointee.baseline_sectors + look.floor) }
            turn += 1
            if turn % 16 == 8 { useTags(index, of: maps.queuesInFlight(disk: index), until: deadline) }
            usleep(100)
        }
        return false
    }

    private func quietLook(_ index: Int) -> Look? {
        let events = events(index)
        guard isQuiet(index, events: events) else { return nil }
        Self.letProcessorsPass()
        let look = look(index)
        return look.isSharp && look.events == events && isQuiet(index, events: events) ? look : nil
    }
}
