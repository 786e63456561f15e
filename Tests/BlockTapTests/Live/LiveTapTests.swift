import CLiveTap
import Foundation
import Synchronization
import Testing

@testable import BlockTap

/// Against the kernel: loop devices, the program attached, every proven point checked exactly.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapTests {
    @Test("Every proven point is a state that the disks had, and in the end the replica is the disks", arguments: [1, 2])
    func provenPointsAreExact(disks: Int) async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: disks)
        defer { writers.stop() }
        var proven = 0
        for _ in 0..<60 {
            try await writers.progress(by: 50)
            guard try await bed.carry().kind == .exact else { continue }
            proven += 1
            let violations = writers.violations(in: bed.images)
            try #require(violations.isEmpty, "\(violations.prefix(3))")
        }
        try await finish(bed, writers)
        #expect(proven > 0)
        await report("proven points, \(disks) disks", bed, writers, proven)
    }

    @Test("Epochs given back and sent again, and groups that die and are taken over, lose no write")
    func survivesLossAndTakeOver() async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 2, .init(pauseMicroseconds: 50))
        defer { writers.stop() }
        let instance = bed.group.instance
        try await bed.carryUntilProven()
        for round in 0..<40 {
            try await writers.progress(by: 30)
            let cut = try await bed.carry(acknowledges: round % 3 != 1)
            if cut.kind == .exact {
                let violations = writers.violations(in: bed.images)
                try #require(violations.isEmpty, "\(violations.prefix(3))")
            }
            if round % 3 == 1 { await bed.group.abandonAll() }
            if round % 4 == 3 {
                bed.kill()
                try await bed.start()
                try #require(bed.group.wasAdopted)
                #expect(bed.group.instance == instance)
            }
        }
        try await finish(bed, writers)
        await report("loss and take-over", bed, writers, 0)
    }

    @Test("What another version of the program left is not taken over: everything is copied again, and nothing is proven before", arguments: [false, true])
    func anotherVersion(hasOtherForm: Bool) async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 2, .init(pauseMicroseconds: 50))
        defer { writers.stop() }
        try await bed.carryUntilProven()
        let instance = bed.group.instance
        bed.kill()
        if hasOtherForm {
            let other = clivetap_create_words(64 * 24)
            try #require(other >= 0)
            defer { close(other) }
            try #require(unlink("\(bed.pins)/map-disks") == 0 && clivetap_pin(other, "\(bed.pins)/map-disks") == 0)
        } else {
            try bed.withPinnedState { $0.pointee.abi += 1 }
        }
        try await bed.start()
        #expect(!bed.group.wasAdopted)
        #expect(bed.group.instance != instance)
        #expect(bed.group.resumption == nil)
        try await bed.fullSync()
        try await finish(bed, writers)
    }

    @Test("Writes by a hardware queue that was not there: nothing is proven, nothing is copied again, until the tap is attached anew")
    func anotherQueue() async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 1, .init(pauseMicroseconds: 50))
        defer { writers.stop() }
        try await bed.carryUntilProven()
        #expect(await bed.group.changedQueues == nil)
        try bed.withPinnedDisk(0) {                                   // as the program does
            $0.pointee.unslotted += 1
            $0.pointee.unmatched += 1
        }
        for _ in 0..<5 { #expect(try await bed.carry().kind == .fuzzy) }
        #expect(await bed.group.changedQueues?.contains("queues") == true)
        #expect(await bed.group.liveStatistics.resyncCount == 0)
        bed.kill()
        try await bed.start()
        #expect(!bed.group.wasAdopted)
        try await bed.fullSync()
        try await finish(bed, writers)
    }

    @Test("A command past the block layer: everything is copied again before a point counts, by whichever process looks next, and once more if it ended meanwhile")
    func passThrough() async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 2, .init(pauseMicroseconds: 50))
        defer { writers.stop() }
        try await bed.carryUntilProven()
        bed.kill()
        try bed.withPinnedDisk(1) { $0.pointee.undescribed += 1 }     // as the program does at its issue
        try await bed.start()
        try #require(bed.group.wasAdopted)
        // Whoever takes over from a process that is killed right then must not go on from what that knew.
        let wasSynced = Mutex<[UInt64]>([])
        bed.onEvent = { [weak bed] _ in
            guard let bed else { return }
            try? bed.withPinnedState { state in wasSynced.withLock { $0.append(state.pointee.is_synced) } }
        }
        #expect(try await bed.carry().kind == .fuzzy)
        #expect(wasSynced.withLock { $0 } == [0])
        bed.onEvent = nil
        let first = await bed.group.liveStatistics
        #expect(first.resyncCount == 1)
        #expect(first.resyncReason?.contains("past the block layer") == true)
        #expect(await bed.group.needsFuzzyCut)
        try bed.withPinnedDisk(1) { $0.pointee.undescribed += 1 }     // and at its end
        while await bed.group.needsFuzzyCut { try await bed.carry() }
        #expect(try await bed.carry().kind == .fuzzy)
        #expect(await bed.group.liveStatistics.resyncCount == 2)
        while await bed.group.needsFuzzyCut { try await bed.carry() }
        try await finish(bed, writers)
        #expect(await bed.group.liveStatistics.resyncCount == 2)
    }

    @Test("Completions that the kernel does not show cost reads, not writes: points stay exact, and it is counted")
    func unseenCompletions() async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 2, .init(pauseMicroseconds: 20))
        defer { writers.stop() }
        await bed.group.inject([], completions: (period: 20_000_000, burst: 3_000_000))
        var proven = 0
        for _ in 0..<40 {
            try await writers.progress(by: 50)
            guard try await bed.carry().kind == .exact else { continue }
            proven += 1
            let violations = writers.violations(in: bed.images)
            try #require(violations.isEmpty, "\(violations.prefix(3))")
        }
        await bed.group.inject([])
        let figures = await bed.group.liveStatistics
        #expect(figures.droppedCompletionCount > 0)
        #expect(figures.unseenCompletionCount > 0)
        #expect(figures.resyncCount == 0)
        #expect(proven > 0)
        try await finish(bed, writers)
        await report("completions dropped", bed, writers, proven)
    }

    @Test("Issues that the kernel does not show are never passed over: no wrong point, a resync that says so, and then exact again", arguments: [
        // The second: much is in slots that has ended, and must not make up for what was missed.
        (issues: (period: 50_000_000, burst: 1_000_000), completions: (period: 30_000_000, burst: 1_000_000)),
        (issues: (period: 61_000_000, burst: 300_000), completions: (period: 20_000_000, burst: 10_000_000)),
    ] as [(issues: (period: UInt64, burst: UInt64), completions: (period: UInt64, burst: UInt64))])
    func unseenIssues(drops: (issues: (period: UInt64, burst: UInt64), completions: (period: UInt64, burst: UInt64))) async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 1, .init(pauseMicroseconds: 20))
        defer { writers.stop() }
        try await bed.carryUntilProven()
        for _ in 0..<5 {
            await bed.group.inject([], issues: drops.issues, completions: drops.completions)
            for _ in 0..<10 {
                try await writers.progress(by: 50)
                guard try await bed.carry().kind == .exact else { continue }
                let violations = writers.violations(in: bed.images)
                try #require(violations.isEmpty, "\(violations.prefix(3))")
            }
            await bed.group.inject([])
            try await bed.carryUntilProven()
            let violations = writers.violations(in: bed.images)
            try #require(violations.isEmpty, "\(violations.prefix(3))")
        }
        let figures = await bed.group.liveStatistics
        #expect(figures.droppedIssueCount > 0)
        #expect(figures.resyncCount > 0)
        #expect(bed.events.withLock { $0.contains { $0.contains("writes were missed") } })
        try await finish(bed, writers)
        await report("issues dropped", bed, writers, 0)
    }

    @Test("Mutants are caught", arguments: [
        LiveTapFaults.forgetInFlightAtCut, .skipCollisionCheck, .singleBuffer, .unsharedCut,
    ])
    func mutantsAreCaught(fault: LiveTapFaults) async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 2)
        defer { writers.stop() }
        try await bed.carryUntilProven()
        await bed.group.inject(fault)
        var points = 0
        for _ in 0..<400 {
            try await writers.progress(by: 20)
            guard try await bed.carry().kind == .exact else { continue }
            points += 1
            if !writers.violations(in: bed.images).isEmpty {
                print("mutant \(fault.rawValue) caught at point \(points)")
                return
            }
        }
        Issue.record("mutant \(fault.rawValue) was not caught in \(points) points")
    }

    @Test("A cut that fails in the middle of its rounds gives back what it took", arguments: [LiveTapFaults.failInRound, [.failInRound, .forgetWhatWasTaken]])
    func failureInRound(fault: LiveTapFaults) async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 2)
        defer { writers.stop() }
        try await bed.carryUntilProven()
        await bed.group.inject(fault)
        var failures = 0
        for _ in 0..<400 where failures < 5 {
            try await writers.progress(by: 50)
            do { try await bed.carry() } catch let error as SystemError where error.errno == ENOMEM { failures += 1 }
        }
        #expect(failures == 5)
        await bed.group.inject([])
        try await bed.carryUntilProven()
        #expect(writers.violations(in: bed.images).isEmpty == (fault == .failInRound))
        writers.stop()
        try await bed.carryUntilProven()
        #expect(try bed.imagesEqualDisks() == (fault == .failInRound))
    }

    @Test("Believing the program without asking the kernel is caught as soon as the kernel hides issues")
    func reconciliationIsNeeded() async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 1)
        defer { writers.stop() }
        try await bed.carryUntilProven()
        await bed.group.inject(.skipReconciliation, issues: (period: 20_000_000, burst: 2_000_000), completions: (period: 20_000_000, burst: 2_500_000))
        for _ in 0..<400 {
            try await writers.progress(by: 20)
            guard try await bed.carry().kind == .exact else { continue }
            if !writers.violations(in: bed.images).isEmpty { return }
        }
        Issue.record("not caught in 400 points")
    }

    // MARK: -

    /// Ends the writers; the replica becomes the disks.
    private func finish(_ bed: LiveTapBed, _ writers: DependentWriters) async throws {
        writers.stop()
        #expect(writers.failures.withLock { $0 } == [])
        try await bed.carryUntilProven()
        let violations = writers.violations(in: bed.images)
        #expect(violations.isEmpty, "\(violations.prefix(3))")
        #expect(try bed.imagesEqualDisks())
        for disk in bed.loops.indices { #expect(try bed.slotSums(disk).kept == bed.slotSums(disk).counted) }
    }

    private func report(_ what: String, _ bed: LiveTapBed, _ writers: DependentWriters, _ proven: Int) async {
        let s = await bed.group.liveStatistics
        let misses = await bed.group.recursionMisses
        print("\(what): \(writers.writeCount) writes, \(proven) points; process: \(s.provenCount) proven, \(s.unprovenCount) unproven, \(s.roundCount) rounds (max \(s.roundsMax)), \(s.collisionCount) collisions, open \(s.openReconciliationCount), resyncs \(s.resyncCount) \(s.resyncReason ?? ""); attached: issued \(s.issuedCount), completed \(s.completedCount), unseen completions \(s.unseenCompletionCount), unmatched \(s.unmatchedCount), dropped \(s.droppedIssueCount)/\(s.droppedCompletionCount), misses \(misses)")
    }
}
