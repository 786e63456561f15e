import Foundation
import Synchronization
import Testing

@testable import BlockTap

/// A store in memory that answers at once.
final class MemoryStore: BlockStore {
    let geometry: BlockGeometry
    let isReadOnly: Bool
    let supportsTrim = true
    let memory: SharedMemory

    init(bytes: Int, isReadOnly: Bool = false, logicalBlockBytes: UInt32 = 512) {
        geometry = BlockGeometry(sizeBytes: UInt64(bytes), logicalBlockBytes: logicalBlockBytes)
        self.isReadOnly = isReadOnly
        memory = SharedMemory(bytes: bytes)
    }

    func submit(_ request: BlockRequestPointer) {
        let place = memory.start + Int(request.pointee.offsetBytes)
        let count = Int(request.pointee.lengthBytes)
        switch request.pointee.operation {
        case .read: request.pointee.buffer!.copyMemory(from: place, byteCount: count)
        case .write: place.copyMemory(from: request.pointee.buffer!, byteCount: count)
        case .trim, .writeZeroes: memset(place, 0, count)
        case .flush: break
        }
        request.complete()
    }
}

/// A store that keeps every request until it is told to let go. On-loop.
final class HoldingStore: BlockStore, @unchecked Sendable {
    let geometry = BlockGeometry(sizeBytes: 64 << 20, logicalBlockBytes: 512)
    let isReadOnly = false
    let supportsTrim = true
    var held: [BlockRequestPointer] = []
    var isHolding = true
    private var waiting: (count: Int, continuation: CheckedContinuation<Void, Never>)?

    func submit(_ request: BlockRequestPointer) {
        guard isHolding else { return request.complete() }
        held.append(request)
        if let waiting, held.count >= waiting.count {
            self.waiting = nil
            waiting.continuation.resume()
        }
    }

    func waitUntilHolding(_ count: Int, on loop: EventLoop) async {
        await withCheckedContinuation { continuation in
            loop.execute {
                if self.held.count >= count { return continuation.resume() }
                self.waiting = (count, continuation)
            }
        }
    }

    /// Completes what is held, and from now on (unless `keepHolding`) everything at once.
    func release(_ count: Int = .max, error: Int32 = 0, keepHolding: Bool = false) {
        isHolding = keepHolding
        let released = held.prefix(count)
        held.removeFirst(released.count)
        for request in released { request.complete(error: error) }
    }
}

/// What is behind the server of a test.
enum Backing: CaseIterable, CustomTestStringConvertible {
    case memory, file, loopDevice

    static var available: [Backing] { allCases.filter { $0 != .loopDevice || LoopDevice.isAvailable } }
    var testDescription: String {
        switch self {
        case .memory: "a store in memory"
        case .file: "DeviceStore over a file"
        case .loopDevice: "DeviceStore over a loop device"
        }
    }
}

final class Log: Sendable {
    private let lines = Mutex<[String]>([])
    func add(_ line: String) { lines.withLock { $0.append(line) } }
    var all: [String] { lines.withLock { $0 } }
}

struct Served: Sendable {
    let socket: String
    let loop: EventLoop
    let log: Log
    var uri: String { "nbd+unix:///?socket=\(socket)" }
    func client(export: String = "") throws -> RawClient { try RawClient.ready(path: socket, export: export) }
}

/// Serves `store` while `body` runs; stops and removes everything afterwards, whatever happened.
func serve<Store: BlockStore>(
    _ makeStore: (EventLoop) throws -> Store, name: String = "disk", _ body: (Served, NBDServer<Store>) async throws -> Void
) async throws {
    let directory = try TemporaryDirectory()
    let loop = try EventLoop(name: "nbd test", entries: 64)
    defer { loop.shutdown() }
    let log = Log()
    let path = directory.path + "/nbd.sock"
    let server = try NBDServer(
        loop: loop, exports: [(name: name, store: try makeStore(loop))], listen: .unix(path: path), log: { log.add($0) })
    let result: Result<Void, any Error>
    do {
        try await body(Served(socket: path, loop: loop, log: log), server)
        result = .success(())
    } catch {
        result = .failure(error)
    }
    await server.stop()
    #expect(access(path, F_OK) != 0, "the socket's path is gone after stop")
    try result.get()
}

func serve(
    _ backing: Backing, bytes: Int = 4 << 20, isReadOnly: Bool = false, _ body: (Served) async throws -> Void
) async throws {
    switch backing {
    case .memory:
        try await serve { _ in MemoryStore(bytes: bytes, isReadOnly: isReadOnly) } _: { served, _ in try await body(served) }
    case .file:
        let file = try TemporaryFile(bytes: bytes)
        try await serveDevice(file.path, isReadOnly: isReadOnly, body)
    case .loopDevice:
        let device = try LoopDevice(bytes: bytes)
        try await serveDevice(device.path, isReadOnly: isReadOnly, body)
    }
}

private func serveDevice(_ path: String, isReadOnly: Bool, _ body: (Served) async throws -> Void) async throws {
    try await serve {
        let device = try BlockDevice.open(path: path, access: isReadOnly ? .readOnly : .readWrite, exclusive: true)
        return DeviceStore(device: device, loop: $0)
    } _: { served, _ in try await body(served) }
}
