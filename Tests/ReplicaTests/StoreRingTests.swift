import BlockTap
import Glibc
import Testing

@testable import Replica

/// Submits requests to a `BlockStore` all at once and waits for them.
final class RequestBatch: BlockRequestOwner, @unchecked Sendable {
    private let loop: EventLoop
    private let done = Replica.Semaphore()
    private var left = 0
    private var errors: [Int32] = []
    private var requests: [BlockRequestPointer] = []

    init(loop: EventLoop) { self.loop = loop }

    override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
        errors[Int(request.pointee.token)] = error
        left -= 1
        if left == 0 { done.signal() }
    }

    struct Item {
        var operation: BlockOperation
        var offset: Int = 0
        var count: Int = 0
        var bytes: [UInt8] = []
        var fua = false
    }

    /// Results by item: (errno, what was read).
    func run<S: BlockStore & SendableMetatype>(_ store: S, _ items: [Item]) -> [(Int32, [UInt8])] {
        var buffers: [UnsafeMutableRawPointer?] = []
        for (index, item) in items.enumerated() {
            let request = BlockRequestPointer.allocate(capacity: 1)
            request.initialize(to: BlockRequest(owner: .passUnretained(self), token: UInt32(index)))
            request.pointee.operation = item.operation
            request.pointee.offsetBytes = UInt64(item.offset)
            request.pointee.lengthBytes = UInt32(item.count)
            if item.fua { request.pointee.flags = .fua }
            var buffer: UnsafeMutableRawPointer?
            if item.operation == .read || item.operation == .write {
                buffer = .allocate(byteCount: item.count, alignment: 4096)
                item.bytes.withUnsafeBytes { if $0.count > 0 { memcpyBytes(buffer!, $0.baseAddress!, $0.count) } }
            }
            request.pointee.buffer = buffer
            buffers.append(buffer)
            requests.append(request)
        }
        errors = [Int32](repeating: -1, count: items.count)
        left = items.count
        nonisolated(unsafe) let target = store
        loop.execute { for request in self.requests { target.submit(request) } }
        done.wait()
        let results = items.indices.map { index -> (Int32, [UInt8]) in
            let isRead = items[index].operation == .read
            return (errors[index], isRead ? [UInt8](UnsafeRawBufferPointer(start: buffers[index]!, count: items[index].count)) : [])
        }
        for buffer in buffers { buffer?.deallocate() }
        for request in requests { request.deallocate() }
        requests = []
        return results
    }
}

@Suite struct StoreRingTests {
    @Test(arguments: [21, 22, 23, 24] as [UInt64])
    func aForkServedThroughTheRingEqualsThePlainArray(seed: UInt64) async throws {
        var random = SeededRandom(seed: seed)
        let directory = TemporaryDirectory()
        let size = 300 * 4096 + 1024
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var model = noise(size, &random)
        let writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, model)
        try writer.zero(volume: 0, offsetBytes: 40 * 4096, lengthBytes: 20 * 4096)
        model.replaceSubrange(40 * 4096..<60 * 4096, with: repeatElement(0, count: 20 * 4096))
        let point = try writer.seal()!
        let origin = model
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "test")

        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        let parent = RecoveryPointStore(reader: try store.openRecoveryPoint(webGroup, point.id, volume: 0), loop: loop)
        var face = ForkStore(fork: try store.openFork(ForkID("f"), volume: 0), loop: loop)
        for round in 1...60 {
            // Ranges that never overlap but often share blocks, all in flight together.
            var items: [RequestBatch.Item] = []
            var sector = random.below(40)
            while sector < size / 512 && items.count < 400 {
                let count = min(size / 512 - sector, 1 + random.below(random.below(12) == 0 ? 300 : 9))
                let (offset, length) = (sector * 512, count * 512)
                switch random.below(8) {
                case 0: items.append(.init(operation: .writeZeroes, offset: offset, count: length, fua: random.below(3) == 0))
                case 1: items.append(.init(operation: .trim, offset: offset, count: length))
                case 2: items.append(.init(operation: .read, offset: offset, count: length))
                case 3: items.append(.init(operation: .flush))
                default: items.append(.init(operation: .write, offset: offset, count: length, bytes: noise(length, &random), fua: random.below(6) == 0))
                }
                sector += count + (random.below(3) == 0 ? random.below(60) : 0)
            }
            items.shuffle(using: &random)
            let before = model
            for item in items {
                let range = item.offset..<item.offset + item.count
                switch item.operation {
                case .write: model.replaceSubrange(range, with: item.bytes)
                case .writeZeroes: model.replaceSubrange(range, with: repeatElement(0, count: item.count))
                case .trim:
                    let first = (range.lowerBound + 4095) / 4096 * 4096
                    let last = range.upperBound == size ? size : range.upperBound / 4096 * 4096
                    if first < last { model.replaceSubrange(first..<last, with: repeatElement(0, count: last - first)) }
                case .read, .flush: break
                }
            }
            let results = batch.run(face, items)
            for (item, result) in zip(items, results) {
                #expect(result.0 == 0)
                if item.operation == .read { #expect(result.1 == Array(before[item.offset..<item.offset + item.count]), "seed \(seed) round \(round)") }
            }
            let whole = batch.run(face, [.init(operation: .read, offset: 0, count: size)])
            #expect(whole[0].0 == 0 && whole[0].1 == model, "seed \(seed) round \(round)")
            if random.below(6) == 0 {
                // What a crash right after a flush would leave.
                #expect(batch.run(face, [.init(operation: .flush)])[0].0 == 0)
                let copy = try directory.copy()
                let crashed = try openStore(copy)
                let fork = try crashed.openFork(ForkID("f"), volume: 0)
                #expect(try fork.image() == model, "seed \(seed) round \(round)")
                try fork.close()
                crashed.close()
                withExtendedLifetime(copy) {}
            }
            if random.below(10) == 0 {
                try await face.close()
                face = ForkStore(fork: try store.openFork(ForkID("f"), volume: 0), loop: loop)
            }
        }
        let untouched = batch.run(parent, (0..<200).map { _ in
            let start = random.below(size / 512)
            return .init(operation: .read, offset: start * 512, count: 512 * (1 + random.below(min(size / 512 - start, 128))))
        } + [.init(operation: .read, offset: 0, count: size)])
        #expect(untouched.last!.0 == 0 && untouched.last!.1 == origin)
        #expect(batch.run(parent, [.init(operation: .write, offset: 0, count: 512, bytes: [UInt8](repeating: 1, count: 512))])[0].0 == EPERM)
        try await face.close()
        let again = try store.openFork(ForkID("f"), volume: 0)
        #expect(try again.image() == model)
        try again.close()
        store.close()
    }

    @Test func aWriteWithFUASurvivesACrash() async throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 20)])
        let point = try store.begin(1).seal()!
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "test")
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        let face = ForkStore(fork: try store.openFork(ForkID("f"), volume: 0), loop: loop)
        let bytes = [UInt8](repeating: 5, count: 1024)
        #expect(batch.run(face, [.init(operation: .write, offset: 512, count: 1024, bytes: bytes, fua: true)])[0].0 == 0)
        let copy = try directory.copy()
        let crashed = try openStore(copy)
        let fork = try crashed.openFork(ForkID("f"), volume: 0)
        #expect(Array(try fork.image()[512..<1536]) == bytes)
        try fork.close()
        crashed.close()
        withExtendedLifetime(copy) {}
        try await face.close()
        store.close()
    }

    @Test func aBadBlockIsAnIOErrorToTheClientAndItsNeighboursAreServed() async throws {
        let directory = TemporaryDirectory()
        var store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 20)])
        let writer = try store.begin(1)
        // Nothing that shrinks: block 10 lies at block 11 of the segment.
        var random = SeededRandom(seed: 25)
        try writer.append(volume: 0, offsetBytes: 0, noise(1 << 20, &random))
        let point = try writer.seal()!
        store.close()
        let segment = try #require(try directory.files().first { $0.hasPrefix("segments/") })
        let descriptor = open(directory.path + "/" + segment, O_WRONLY)
        #expect(pwrite(descriptor, "x", 1, 11 * 4096 + 99) == 1)
        close(descriptor)
        store = try openStore(directory)
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "test")
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        let parent = RecoveryPointStore(reader: try store.openRecoveryPoint(webGroup, point.id, volume: 0), loop: loop)
        let fork = ForkStore(fork: try store.openFork(ForkID("f"), volume: 0), loop: loop)
        func errors<S: BlockStore & SendableMetatype>(_ store: S) -> [Int32] {
            batch.run(store, [9, 10, 11].map { .init(operation: .read, offset: $0 * 4096, count: 4096) } + [.init(operation: .read, offset: 0, count: 1 << 20)]).map(\.0)
        }
        #expect(errors(parent) == [0, EIO, 0, EIO])
        #expect(errors(fork) == [0, EIO, 0, EIO])
        // Changing part of a bad block cannot be done, replacing it can.
        let bytes = [UInt8](repeating: 6, count: 4096)
        #expect(batch.run(fork, [.init(operation: .write, offset: 10 * 4096, count: 512, bytes: Array(bytes[..<512]))])[0].0 == EIO)
        #expect(batch.run(fork, [.init(operation: .write, offset: 10 * 4096, count: 4096, bytes: bytes)])[0].0 == 0)
        #expect(errors(fork) == [0, 0, 0, 0])
        #expect(store.statistics().badBlockCount == 5)
        try await fork.close()
        store.close()
    }
}
