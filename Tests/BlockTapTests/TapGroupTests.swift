import BlockTap
import Foundation
import Synchronization
import Testing

/// The tap on a real event loop and a real file: a chain of dependent writes, cuts meanwhile, every exact epoch checked.
@Suite struct TapGroupTests {
    static let blockCount = 512

    @Test(arguments: [1, 2]) func dependentWritesAreAPrefixInEveryExactEpoch(diskCount: Int) async throws {
        let files = try (0..<diskCount).map { _ in try TemporaryFile(bytes: Self.blockCount * blockBytes) }
        let loop = try EventLoop(name: "tap-test")
        defer { loop.shutdown() }
        let devices = try files.enumerated().map { ("d\($0.offset)", try BlockDevice.open(path: $0.element.path, access: .readWrite, exclusive: true)) }
        let group = await TapGroup(loop: loop, disks: devices, instance: "test")
        let writer = await loop.run { ChainWriter(group: group, diskCount: diskCount) }
        var replica = Array(repeating: Array(repeating: UInt64.max, count: Self.blockCount), count: diskCount)
        group.beginFullSync()
        loop.execute { writer.next() }
        var exactCount = 0
        while exactCount < 60 {
            let cut = try await group.cut(fuzzyBytesMax: 256 << 10)
            try await drain(group, cut.epoch, into: &replica)
            group.acknowledge(cut.epoch)
            guard cut.kind == .exact else { continue }
            exactCount += 1
            #expect(isPrefix(replica, log: await loop.run { writer.log }))
        }
        await loop.run { writer.isStopping = true }
        while await loop.run({ !writer.isIdle }) { await Task.yield() }
        #expect(await loop.run { writer.lastError } == 0)
        let last = try await group.cut(fuzzyBytesMax: 0)
        try await drain(group, last.epoch, into: &replica)
        group.acknowledge(last.epoch)
        for (file, image) in zip(files, replica) {
            let data = try Data(contentsOf: URL(fileURLWithPath: file.path))
            #expect(data.withUnsafeBytes { bytes in image.indices.allSatisfy { bytes.load(fromByteOffset: $0 * blockBytes, as: UInt64.self) == image[$0] } })
        }
        let figures = await group.statistics
        #expect(figures.behindBytes == 0 && figures.unsyncedBytes == 0)
    }

    @Test func heldWritesWaitAndTheCutHasAllThatWasAnswered() async throws {
        let file = try TemporaryFile(bytes: Self.blockCount * blockBytes)
        let loop = try EventLoop(name: "tap-test")
        defer { loop.shutdown() }
        let group = await TapGroup(loop: loop, disks: [("d0", try BlockDevice.open(path: file.path, access: .readWrite, exclusive: true))], instance: "test")
        let writer = await loop.run { ChainWriter(group: group, diskCount: 1) }
        var replica = [Array(repeating: UInt64(0), count: Self.blockCount)]
        loop.execute { writer.next() }
        for round in 0..<30 {
            try await Task.sleep(for: .milliseconds(2))
            await group.holdWrites("a")
            // Another holder takes over without a gap; the first can end nothing any more.
            await group.holdWrites("b")
            await group.releaseWrites("a")
            let answered = await loop.run { writer.log.count }
            let cut = try await group.cut(fuzzyBytesMax: 0)
            try await drain(group, cut.epoch, into: &replica)
            group.acknowledge(cut.epoch)
            try await Task.sleep(for: .milliseconds(2))
            #expect(await loop.run { writer.log.count } == answered)
            let image = try Data(contentsOf: URL(fileURLWithPath: file.path))
            #expect(image.withUnsafeBytes { bytes in replica[0].indices.allSatisfy { bytes.load(fromByteOffset: $0 * blockBytes, as: UInt64.self) == replica[0][$0] } }, "round \(round)")
            await group.releaseWrites("b")
            // What waited is done.
            while await loop.run({ writer.log.count }) == answered { try await Task.sleep(for: .milliseconds(1)) }
        }
        await group.holdWrites("c")
        await loop.run { writer.isStopping = true }
        await group.refuseHeldWrites("c", error: ESHUTDOWN)
        while await loop.run({ !writer.isIdle }) { await Task.yield() }
        #expect(await loop.run { writer.lastError } == ESHUTDOWN)
    }

    /// Takes one epoch's items; fails the test when the epoch is abandoned.
    private func drain(_ group: TapGroup, _ epoch: EpochNumber, into replica: inout [[UInt64]]) async throws {
        let (stream, continuation) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
        group.setWakeup { continuation.yield() }
        defer { group.setWakeup(nil) }
        var wakeups = stream.makeAsyncIterator()
        while true {
            while let item = group.nextItem() {
                switch item {
                case .data(_, let buffer):
                    for block in 0..<(buffer.lengthBytes / blockBytes) {
                        replica[buffer.disk][Int(buffer.offsetBytes) / blockBytes + block] = (buffer.memory + block * blockBytes).load(as: UInt64.self)
                    }
                    group.release(buffer)
                case .zero(_, let disk, let offset, let length):
                    for block in 0..<(Int(length) / blockBytes) { replica[disk][Int(offset) / blockBytes + block] = 0 }
                case .end(let ended):
                    #expect(ended == epoch)
                    return
                case .abandoned(_, let reason):
                    Issue.record("abandoned: \(reason)")
                    return
                }
            }
            await wakeups.next()
        }
    }

    private func isPrefix(_ replica: [[UInt64]], log: [(disk: Int, block: Int)]) -> Bool {
        let newest = replica.joined().max() ?? 0
        var expected = replica.map { $0.map { _ in UInt64(0) } }
        for n in 0..<Int(newest) { expected[log[n].disk][log[n].block] = UInt64(n + 1) }
        return expected == replica
    }

    /// Issues one write at a time, the next when the one before was answered. On the loop's thread.
    final class ChainWriter: BlockRequestOwner, @unchecked Sendable {
        let group: TapGroup
        let diskCount: Int
        var log: [(disk: Int, block: Int)] = []
        var isStopping = false
        var isIdle = true
        var lastError: Int32 = 0
        private let request: BlockRequestPointer
        private let memory: UnsafeMutableRawPointer
        private var random = SplitMix(seed: 7)

        init(group: TapGroup, diskCount: Int) {
            self.group = group
            self.diskCount = diskCount
            request = .allocate(capacity: 1)
            memory = .allocate(byteCount: blockBytes, alignment: blockBytes)
            super.init()
            request.initialize(to: BlockRequest(owner: .passUnretained(self), token: 0))
        }

        deinit {
            request.deallocate()
            memory.deallocate()
        }

        func next() {
            if isStopping {
                isIdle = true
                return
            }
            isIdle = false
            let disk = random.below(diskCount)
            let block = random.chance(30) ? random.below(8) : random.below(TapGroupTests.blockCount)
            log.append((disk, block))
            memory.initializeMemory(as: UInt64.self, repeating: UInt64(log.count), count: blockBytes / 8)
            request.pointee.operation = .write
            request.pointee.offsetBytes = UInt64(block * blockBytes)
            request.pointee.lengthBytes = UInt32(blockBytes)
            request.pointee.buffer = memory
            group.disk(disk).submit(request)
        }

        override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
            lastError = error
            if error == 0 { next() } else { isIdle = true }
        }
    }
}
