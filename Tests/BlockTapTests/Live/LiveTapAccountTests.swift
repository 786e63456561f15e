import CLiveTap
import Foundation
import Testing

@testable import BlockTap

/// What the kernel's account says of writes that its tracepoints did not show, and when nothing can be said.
@Suite("The live tap and the kernel's account", .serialized, .enabled(if: LiveTapBed.isAvailable))
struct LiveTapAccountTests {
    private static let all: (period: UInt64, burst: UInt64) = (1 << 30, 1 << 30)

    /// A disk that is followed, with a point; nobody else writes to it.
    private func followed() async throws -> (bed: LiveTapBed, device: BlockDevice) {
        let bed = try LiveTapBed(disks: 1, bytes: 16 << 20)
        bed.configuration.roundsMilliseconds = 100
        try await bed.start()
        try await bed.fullSync()
        try await bed.carryUntilProven()
        return (bed, try BlockDevice.open(path: bed.loops[0].path, access: .readWrite, exclusive: false))
    }

    private func write(_ device: BlockDevice, block: Int) throws {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: blockBytes, alignment: blockBytes)
        defer { memory.deallocate() }
        memset(memory, Int32(block % 255 + 1), blockBytes)
        #expect(pwrite(device.fd, memory, blockBytes, off_t(block * blockBytes)) == blockBytes)
    }

    /// Reads with every tag that the disk has, until nothing is in slots.
    private func useTags(_ bed: LiveTapBed, _ device: BlockDevice) throws {
        let count = 256
        let memory = UnsafeMutableRawPointer.allocate(byteCount: count * blockBytes, alignment: blockBytes)
        defer { memory.deallocate() }
        let reader = try LiveReader()
        for _ in 0..<100 where try bed.slotSums(0).kept != 0 {
            reader.read((0..<count).map { .init(fd: device.fd, offsetBytes: UInt64($0 * 2 * blockBytes), lengthBytes: blockBytes, memory: memory + $0 * blockBytes) }, depth: count) { _, _ in }
        }
        #expect(try bed.slotSums(0).kept == 0)
    }

    /// Everything was compared for the last of so many times, and then a point was proven that has everything.
    private func expectAllCompared(_ bed: LiveTapBed, _ resyncCount: UInt64) async throws {
        #expect(await bed.group.liveStatistics.resyncCount == resyncCount)
        while await bed.group.needsFuzzyCut { try await bed.carry() }
        #expect(try await bed.carry().kind == .exact)
        #expect(try bed.imagesEqualDisks())
    }

    @Test("A write that had ended unseen when others were missed does not make up for the next one that is missed (and with the mistake of believing the slots, it does)", arguments: [
        [], .trustSlots,
    ] as [LiveTapFaults])
    func leftOver(mistake: LiveTapFaults) async throws {
        let faults = mistake.union(.leaveTags)
        var (bed, device) = try await followed()
        for attempt in 1... {
            await bed.group.inject(faults, completions: Self.all)
            try write(device, block: 10)
            await bed.group.inject(faults, issues: Self.all, completions: Self.all)
            try write(device, block: 20)
            await bed.group.inject(faults)
            #expect(try bed.slotSums(0).kept == 8)
            #expect(try await bed.carry().kind == .fuzzy)
            #expect(await bed.group.liveStatistics.resyncCount == 1)
            while await bed.group.needsFuzzyCut { try await bed.carry() }
            // Unless a read of the comparison had that tag: then there is nothing to see here.
            if try bed.slotSums(0).kept == 8 { break }
            try #require(attempt < 20)
            (bed, device) = try await followed()
        }

        try useTags(bed, device)
        await bed.group.inject(faults, issues: Self.all, completions: Self.all)
        try write(device, block: 30)
        await bed.group.inject([])
        if mistake == .trustSlots {
            #expect(try await bed.carry().kind == .exact)
            return #expect(try !bed.imagesEqualDisks())
        }
        #expect(try await bed.carry().kind == .fuzzy)
        try await expectAllCompared(bed, 2)
    }

    @Test("As long as it cannot be known what is in flight when writes were missed, nothing is proven; then all is compared once more")
    func noBaseline() async throws {
        let (bed, writers) = try await DependentWriters.followed(disks: 1, .init(pauseMicroseconds: 20))
        defer { writers.stop() }
        try await bed.carryUntilProven()
        await bed.group.inject(.leaveTags, issues: Self.all, completions: Self.all)
        try await writers.progress(by: 200)
        await bed.group.inject(.leaveTags, completions: Self.all)
        for _ in 0..<5 {
            try await writers.progress(by: 50)
            #expect(try await bed.carry().kind == .fuzzy)
        }
        let before = await bed.group.liveStatistics
        #expect(before.resyncCount == 1)
        #expect(before.openReconciliationCount > 0)

        await bed.group.inject([])
        try await bed.carryUntilProven()
        let after = await bed.group.liveStatistics
        #expect(after.resyncCount == 2)
        #expect(after.resyncReason?.contains("it was not known what was in flight") == true)
        #expect(writers.violations(in: bed.images).isEmpty)
        writers.stop()
        try await bed.carryUntilProven()
        #expect(try bed.imagesEqualDisks())
    }

    @Test("An account that cannot be right is taken anew, and all is compared", arguments: [8, -8] as [Int64])
    func wrongBaseline(error: Int64) async throws {
        let (bed, device) = try await followed()
        try bed.withPinnedDisk(0) { $0.pointee.baseline_sectors += error }
        try write(device, block: 40)
        #expect(try await bed.carry().kind == .fuzzy)
        try await expectAllCompared(bed, 1)
    }

    @Test("With the disk's I/O statistics off nothing is proven; when they are on again, all is compared")
    func statisticsOff() async throws {
        let (bed, device) = try await followed()
        let file = "/sys/class/block/\(bed.loops[0].path.split(separator: "/").last!)/queue/iostats"
        try "0".write(toFile: file, atomically: false, encoding: .utf8)
        for block in 50..<53 {
            try write(device, block: block)
            #expect(try await bed.carry().kind == .fuzzy)
        }
        try "1".write(toFile: file, atomically: false, encoding: .utf8)
        try write(device, block: 53)
        #expect(try await bed.carry().kind == .fuzzy)
        try await expectAllCompared(bed, 1)
    }

    @Test("Visiting every processor leaves the thread where it may run")
    func processors() throws {
        func allowed() throws -> Substring? {
            try String(contentsOfFile: "/proc/thread-self/status", encoding: .utf8).split(separator: "\n").first { $0.hasPrefix("Cpus_allowed_list") }
        }
        let before = try allowed()
        #expect(before != nil)
        LiveReconciliation.visitProcessors()
        #expect(try allowed() == before)
        LiveReconciliation.letProcessorsPass()
    }
}
