import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica
@testable import StoreSimulation

/// Weeks of epochs under the default policy, on a clock that only the test moves. The promises of `docs/store-format.md`, "Upkeep", in figures.
@Suite struct UpkeepLongRunTests {
    /// In memory where there is such a file system: tens of thousands of syncs.
    private func makeDirectory() -> String {
        var template = Array(((access("/dev/shm", W_OK) == 0 ? "/dev/shm" : NSTemporaryDirectory()) + "/store-test-XXXXXX").utf8CString)
        return String(cString: mkdtemp(&template)!)
    }

    @Test func sixteenDaysUnderTheDefaultPolicyKeepTheBounds() throws { try run(seed: 1, days: 16, canPunch: true) }

    /// Space comes back by moving data only: it takes more of both.
    @Test func fiveDaysWithoutPunchingKeepTheBoundOfRewriting() throws { try run(seed: 2, days: 5, canPunch: false) }

    /// Clusters of which most has been written again lie around as a whole.
    @Test(arguments: [3500, 2000]) func fiveDaysOfDataThatShrinksKeepTheBounds(noiseBytes: Int) throws { try run(seed: 3, days: 5, canPunch: true, noiseBytes: noiseBytes) }

    private func run(seed: UInt64, days: UInt64, canPunch: Bool, noiseBytes: Int = 4096) throws {
        let path = makeDirectory()
        defer { try? FileManager.default.removeItem(atPath: path) }
        let storage = try LimitedStorage(directory: path)
        storage.canPunch = canPunch
        var options = StoreOptions()
        options.segmentBytes = 8 << 20
        options.preallocationBytes = 1 << 20
        options.writeBufferBytes = 256 << 10
        let scene = try UpkeepScene(seed: seed, storage: storage, blockCount: 8192, options: options)
        scene.noiseBytes = noiseBytes
        scene.options.manifestRewriteBytes = 200_000
        scene.store.close()
        try scene.open()
        scene.store.setRetention(webGroup, .standard)
        let start = scene.clock.now
        var epochs = 0
        var hours: Set<UInt64> = []
        var (chainMax, pointsMax, spaceMax, manifestMax) = (0, 0, 0.0, UInt64(0))
        var nextLook = start + 6 * 3_600_000_000_000
        // The first epoch brings the whole disk.
        try scene.receive(extents: 40, blocksMax: 400)
        while scene.clock.now < start + days * 86_400_000_000_000 {
            // An epoch a minute, now and then one a second, now and then the source is away for hours.
            switch scene.random.below(1000) {
            case 0: scene.clock.now += UInt64(scene.random.below(6 * 3600)) * 1_000_000_000
            case 1..<100: scene.clock.now += 1_000_000_000
            default: scene.clock.now += 60_000_000_000
            }
            if let point = try scene.receive(extents: 1 + scene.random.below(12), blocksMax: 8, kind: scene.random.below(50) == 0 ? .fuzzy : .exact) {
                hours.insert(point.receivedTimeNanoseconds / 3_600_000_000_000)
            }
            epochs += 1
            try scene.upkeep()
            let kept = scene.store.recoveryPoints(webGroup)
            scene.points = scene.points.filter { id, _ in kept.contains { $0.id == id } }
            chainMax = max(chainMax, scene.chainLength() - kept.count)
            pointsMax = max(pointsMax, kept.count)
            if scene.clock.now >= nextLook {
                nextLook += 6 * 3_600_000_000_000
                let live = UInt64(scene.liveBlocks * 4096)
                let taken = try scene.allocatedBytes("segments")
                spaceMax = max(spaceMax, Double(taken - min(taken, options.segmentBytes)) / Double(live))
                #expect(taken <= live * (canPunch ? 13 : 19) / 10 + options.segmentBytes)
                manifestMax = max(manifestMax, try scene.storage.open("MANIFEST", .read, direct: false).size())
            }
        }
        try scene.check()
        let figures = scene.store.statistics()
        let rewritten = Double(figures.upkeep.indexBytesRewritten + figures.upkeep.dataBytesMoved) / Double(scene.received)
        print(
            """
            long run\(canPunch ? "" : " without punching")\(noiseBytes < 4096 ? " of data that shrinks" : ""): \(epochs) epochs in \(days) days, \(scene.received >> 20) MiB received; at most \(pointsMax) points; layers beyond points at most \
            \(chainMax); space beyond the open segment at most \(String(format: "%.3f", spaceMax)) x live; rewritten \(String(format: "%.3f", rewritten)) per byte \
            (index \(figures.upkeep.indexBytesRewritten >> 20) MiB, data \(figures.upkeep.dataBytesMoved >> 20) MiB); MANIFEST at most \(manifestMax) bytes; \
            punched \(figures.upkeep.bytesReclaimed >> 20) MiB
            """)
        #expect(epochs > days * 1000)
        #expect(chainMax <= 24)
        #expect(rewritten <= 1.5)
        #expect(manifestMax < 2_000_000)
        // 24 hourly points in 24 hours: one of each hour in which there were any.
        let hour: UInt64 = 3_600_000_000_000
        let kept = Set(scene.store.recoveryPoints(webGroup).map { $0.receivedTimeNanoseconds / hour })
        for slot in hours where slot * hour + 23 * hour > scene.clock.now { #expect(kept.contains(slot)) }
        scene.store.close()
        try scene.open()
        try scene.check()
        scene.store.close()
    }
}
