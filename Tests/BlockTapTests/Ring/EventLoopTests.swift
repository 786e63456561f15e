import Glibc
import Testing

@testable import BlockTap

/// Collects completions and tells a waiting test when as many as expected have come.
final class Collector: IOHandler, @unchecked Sendable {
    private var results: [(token: UInt32, result: Int32)] = []
    private var waiting: (count: Int, continuation: CheckedContinuation<[UInt32: Int32], Never>)?
    var onCompletion: ((UInt32, Int32) -> Void)?
    var batchEndCount = 0

    override func ioCompleted(token: UInt32, result: Int32) {
        results.append((token, result))
        onCompletion?(token, result)
        wake()
    }

    override func batchEnded() { batchEndCount += 1 }

    private func wake() {
        guard let waiting, results.count >= waiting.count else { return }
        self.waiting = nil
        waiting.continuation.resume(returning: Dictionary(results.map { ($0.token, $0.result) }) { _, last in last })
    }

    /// Runs `submit` on the loop and waits until `count` completions have come in all.
    func results(_ count: Int, on loop: EventLoop, after submit: @escaping @Sendable (Collector) -> Void) async -> [UInt32: Int32] {
        await withCheckedContinuation { continuation in
            loop.execute {
                self.waiting = (count, continuation)
                submit(self)
                self.wake()
            }
        }
    }
}

@Suite struct EventLoopTests {
    @Test func writesAndReadsBack() async throws {
        let file = try TemporaryFile(bytes: 1 << 20)
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let collector = Collector()
        let id = await loop.run { loop.register(collector) }
        let memory = SharedMemory(bytes: 8192)
        memory.start.storeBytes(of: 0x1234_5678, as: UInt32.self)
        let written = await collector.results(1, on: loop) { _ in
            loop.submitWrite(fd: file.fd, from: memory.start, count: 4096, offset: 8192, dsync: true, handler: id, token: 7)
        }
        #expect(written == [7: 4096])
        let read = await collector.results(2, on: loop) { _ in
            loop.submitRead(fd: file.fd, into: memory.start + 4096, count: 4096, offset: 8192, handler: id, token: 8)
        }
        #expect(read[8] == 4096)
        #expect((memory.start + 4096).load(as: UInt32.self) == 0x1234_5678)
    }

    @Test func losesNothingWhenTheQueueIsFull() async throws {
        let file = try TemporaryFile(bytes: 1 << 20)
        let loop = try EventLoop(name: "test", entries: 4)
        defer { loop.shutdown() }
        let collector = Collector()
        let id = await loop.run { loop.register(collector) }
        let memory = SharedMemory(bytes: 4096)
        let count = 5000
        let results = await collector.results(count, on: loop) { _ in
            for token in 0..<count {
                loop.submitRead(fd: file.fd, into: memory.start, count: 512, offset: UInt64(token % 128) * 512, handler: id, token: UInt32(token))
            }
        }
        #expect(results.count == count)
        #expect(results.values.allSatisfy { $0 == 512 })
    }

    @Test func reportsErrorsAsNegativeErrno() async throws {
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let collector = Collector()
        let id = await loop.run { loop.register(collector) }
        let memory = SharedMemory(bytes: 4096)
        let results = await collector.results(2, on: loop) { _ in
            loop.submitRead(fd: -1, into: memory.start, count: 512, offset: 0, handler: id, token: 1)
            loop.submitDataSync(fd: -1, handler: id, token: 2)
        }
        #expect(results == [1: -EBADF, 2: -EBADF])
    }

    @Test func timeoutFiresAndCanBeCancelled() async throws {
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let collector = Collector()
        let id = await loop.run { loop.register(collector) }
        let results = await collector.results(2, on: loop) { _ in
            loop.submitTimeout(nanoseconds: 1_000_000, handler: id, token: 1)
            loop.submitTimeout(nanoseconds: 3_600_000_000_000, handler: id, token: 2)
            loop.submitCancel(handler: id, token: 2)
        }
        #expect(results == [1: -ETIME, 2: -ECANCELED])
    }

    @Test func anUnregisteredHandlerHearsNothingEvenWhenItsSlotIsReused() async throws {
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let first = Collector(), second = Collector()
        let oldID = await loop.run { loop.register(first) }
        let results = await second.results(1, on: loop) { _ in
            loop.submitTimeout(nanoseconds: 1_000_000, handler: oldID, token: 1)
            loop.unregister(oldID)
            let id = loop.register(second)
            #expect(id.slot == oldID.slot)
            loop.submitTimeout(nanoseconds: 3_000_000, handler: id, token: 9)
        }
        #expect(results == [9: -ETIME])
    }

    @Test func batchEndIsCalledOncePerBatch() async throws {
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let collector = Collector()
        let id = await loop.run { loop.register(collector) }
        await loop.run {
            loop.afterBatch(id)
            loop.afterBatch(id)
        }
        #expect(await loop.run { collector.batchEndCount } == 1)
    }

    @Test func tasksOfManyThreadsAllRunInOrder() async throws {
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let seen = Seen()
        await withTaskGroup(of: Void.self) { group in
            for writer in 0..<8 {
                group.addTask {
                    for number in 1...1000 {
                        loop.execute { seen.record(number, of: writer) }
                    }
                }
            }
        }
        await loop.run {}
        #expect(await loop.run { seen.last } == Array(repeating: 1000, count: 8))
    }

    private final class Seen: @unchecked Sendable {
        var last = Array(repeating: 0, count: 8)
        func record(_ number: Int, of writer: Int) {
            #expect(last[writer] == number - 1)
            last[writer] = number
        }
    }

    @Test func shutdownWaitsForWhatIsInFlightAndIsIdempotent() async throws {
        let loop = try EventLoop(name: "test", entries: 8)
        let collector = Collector()
        await loop.run {
            let id = loop.register(collector)
            loop.submitTimeout(nanoseconds: 3_600_000_000_000, handler: id, token: 1)
        }
        loop.shutdown()
        loop.shutdown()
        #expect(!loop.execute {})
    }

    @Test func fixedBuffersReadTheSameBytes() async throws {
        let file = try TemporaryFile(bytes: 1 << 16)
        let loop = try EventLoop(name: "test", entries: 8)
        defer { loop.shutdown() }
        let collector = Collector()
        let id = await loop.run { loop.register(collector) }
        let memory = SharedMemory(bytes: 1 << 16)
        memory.start.initializeMemory(as: UInt8.self, repeating: 0xA5, count: 8192)
        let results = await collector.results(1, on: loop) { _ in
            loop.addFixedBuffer(.init(start: memory.start, count: 1 << 16))
            #expect(loop.fixedBufferIndex(memory.start + 4096, count: 4096) != nil)
            #expect(loop.fixedBufferIndex(memory.start + 4096, count: 1 << 16) == nil)
            loop.submitWrite(fd: file.fd, from: memory.start, count: 8192, offset: 0, dsync: false, handler: id, token: 1)
        }
        #expect(results == [1: 8192])
        let read = await collector.results(2, on: loop) { _ in
            loop.submitRead(fd: file.fd, into: memory.start + 16384, count: 8192, offset: 0, handler: id, token: 2)
        }
        #expect(read[2] == 8192)
        #expect((memory.start + 16384).load(fromByteOffset: 8191, as: UInt8.self) == 0xA5)
        await loop.run { loop.removeFixedBuffer(.init(start: memory.start, count: 1 << 16)) }
        #expect(await loop.run { loop.fixedBufferIndex(memory.start, count: 4096) == nil })
    }
}
