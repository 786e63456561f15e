import Foundation
import Synchronization
import Testing

@testable import BlockTap

@Suite(.serialized) struct NBDServerTests {
    @Test func memoryExhaustionStopsReadingAndGoesOnLater() async throws {
        let store = HoldingStore()
        try await serve { _ in store } _: { served, _ in
            let large = try served.client(), small = try served.client()
            // Two of these fill the arena.
            for cookie in 1...3 as ClosedRange<UInt64> {
                try large.send(RawClient.header(0, cookie: cookie, length: 32 << 20))
            }
            await store.waitUntilHolding(2, on: served.loop)
            try small.send(RawClient.header(0, cookie: 9, length: 512))
            // A flush needs no memory, but waits behind those who do: nobody overtakes a large request for ever.
            try small.send(RawClient.header(3, cookie: 10))
            #expect(await served.loop.run { store.held.count } == 2)
            await served.loop.run { store.release() }
            for cookie in 1...3 as ClosedRange<UInt64> {
                #expect(try large.reply() == (cookie, 0))
                _ = try large.receive(32 << 20)
            }
            #expect(try small.reply() == (9, 0))
            _ = try small.receive(512)
            #expect(try small.reply() == (10, 0))
        }
    }

    @Test func whoSitsOnMemoryThatOthersWaitForIsCutOff() async throws {
        try await serve({ _ in MemoryStore(bytes: 64 << 20) }, stallNanoseconds: 50_000_000) { served, _ in
            // Two announced and never sent payloads take all memory.
            let stalled = try [served.client(), served.client()]
            for client in stalled { try client.send(RawClient.header(1, cookie: 1, length: 32 << 20)) }
            let patient = try served.client()
            #expect(try patient.read(512, at: 0).count == 512)
            #expect(stalled.allSatisfy { $0.isClosedByServer() })
            #expect(served.log.all.contains { $0.contains("while others wait for memory") })
        }
    }

    /// The kernel receives into a payload's memory until the receive has ended, whatever was decided about the connection meanwhile.
    @Test func memoryOfACutOffPayloadIsNotReusedWhileItIsReceivedInto() async throws {
        let directory = try TemporaryDirectory()
        let path = directory.path + "/nbd.sock"
        let loop = try EventLoop(name: "nbd test", entries: 64)
        defer { loop.shutdown() }
        let store = HoldingStore()
        let stalled = Mutex<[RawClient]>([])
        // The stalled clients' payloads arrive at the very moment at which they are cut off.
        let server = try NBDServer(
            loop: loop, exports: [(name: "disk", store: store)], listen: .unix(path: path), stallNanoseconds: 50_000_000,
            log: { _ in
                for client in stalled.withLock({ clients in defer { clients = [] }; return clients }) {
                    try? client.send([UInt8](repeating: 0xAA, count: 100_000))
                }
            })
        let clients = [try RawClient.ready(path: path), try RawClient.ready(path: path)]
        stalled.withLock { $0 = clients }
        for client in clients { try client.send(RawClient.header(1, cookie: 1, length: 32 << 20)) }
        let patient = try RawClient.ready(path: path)
        try patient.send(RawClient.header(1, cookie: 2, length: 65536) + [UInt8](repeating: 0x55, count: 65536))
        await store.waitUntilHolding(1, on: loop)
        let isIntact = await loop.run {
            let request = store.held[0].pointee
            return UnsafeRawBufferPointer(start: request.buffer!, count: Int(request.lengthBytes)).allSatisfy { $0 == 0x55 }
        }
        #expect(isIntact, "another connection's bytes are in a request of this one")
        await loop.run { store.release() }
        #expect(try patient.reply() == (2, 0))
        await server.stop()
    }

    @Test func aClientThatDoesNotTakeItsRepliesIsCutOffWhenOthersWait() async throws {
        let store = HoldingStore()
        try await serve({ _ in store }, stallNanoseconds: 50_000_000) { served, _ in
            let stalled = try served.client()
            for cookie in 1...2 as ClosedRange<UInt64> { try stalled.send(RawClient.header(0, cookie: cookie, length: 32 << 20)) }
            await store.waitUntilHolding(2, on: served.loop)
            await served.loop.run { store.release() }
            let patient = try served.client()
            #expect(try patient.ask(.read, offset: 0, length: 32 << 20) == 0)
            #expect(served.log.all.contains { $0.contains("while others wait for memory") })
        }
    }

    @Test func moreRequestsThanSlotsAreAllAnswered() async throws {
        let store = HoldingStore()
        try await serve { _ in store } _: { served, _ in
            let client = try served.client()
            let count = 3 * NBDSlab.slotCount
            try client.send((0..<count).flatMap { RawClient.header(3, cookie: UInt64($0)) })
            await store.waitUntilHolding(NBDSlab.slotCount, on: served.loop)
            #expect(await served.loop.run { store.held.count } == NBDSlab.slotCount)
            await served.loop.run { store.release() }
            var cookies = Set<UInt64>()
            for _ in 0..<count {
                let reply = try client.reply()
                #expect(reply.error == 0)
                cookies.insert(reply.cookie)
            }
            #expect(cookies.count == count)
        }
    }

    @Test func theStoresErrorsReachTheClient() async throws {
        let store = HoldingStore()
        try await serve { _ in store } _: { served, _ in
            let client = try served.client()
            for (error, wire) in [(EIO, EIO), (ENOSPC, ENOSPC), (ENXIO, EIO), (EROFS, EPERM)] as [(Int32, Int32)] {
                try client.send(RawClient.header(0, cookie: 1, length: 4096))
                await store.waitUntilHolding(1, on: served.loop)
                await served.loop.run { store.release(error: error, keepHolding: true) }
                #expect(try client.reply() == (1, wire))
            }
        }
    }

    @Test func stopAnswersWhatIsInFlightAndRefusesNewClients() async throws {
        let store = HoldingStore()
        try await serve { _ in store } _: { served, server in
            let client = try served.client()
            try client.send(RawClient.header(0, cookie: 1, length: 4096))
            await store.waitUntilHolding(1, on: served.loop)
            async let stopped: Void = server.stop()
            // Only once stop has begun does the socket's path go.
            while access(served.socket, F_OK) == 0 { await Task.yield() }
            #expect(throws: (any Error).self) { try RawClient(path: served.socket) }
            await served.loop.run { store.release() }
            #expect(try client.reply() == (1, 0))
            #expect(try client.receive(4096).count == 4096)
            await stopped
            #expect(client.isClosedByServer())
            await server.stop()
        }
    }

    @Test func aClientThatDiesWithRequestsInFlightLeavesNothingBehind() async throws {
        let store = HoldingStore()
        try await serve { _ in store } _: { served, server in
            var client: RawClient? = try served.client()
            try client!.send((0..<10).flatMap { RawClient.header(0, cookie: UInt64($0), length: 1 << 20) })
            try client!.send(RawClient.header(1, cookie: 99, length: 1 << 20) + [1, 2, 3])
            await store.waitUntilHolding(10, on: served.loop)
            client = nil
            // Noticed before any reply could fail: the server says what the client was in the middle of.
            while !served.log.all.contains(where: { $0.contains("in the middle of a message") }) { await Task.yield() }
            await served.loop.run { store.release() }
            while await server.connectionCount > 0 { await Task.yield() }
            // All memory is there again.
            let next = try served.client()
            for _ in 0..<2 { try next.send(RawClient.header(0, cookie: 1, length: 32 << 20)) }
            for _ in 0..<2 {
                #expect(try next.reply().error == 0)
                _ = try next.receive(32 << 20)
            }
        }
    }

    @Test func severalExportsAreFoundByName() async throws {
        let directory = try TemporaryDirectory()
        let loop = try EventLoop(name: "nbd test")
        defer { loop.shutdown() }
        let path = directory.path + "/s"
        let server = try NBDServer(
            loop: loop, exports: [("vda", MemoryStore(bytes: 1 << 20)), ("vdb", MemoryStore(bytes: 2 << 20))],
            listen: .unix(path: path))
        do {
            let first = try RawClient.ready(path: path), second = try RawClient.ready(path: path, export: "vdb")
            #expect(try second.write([UInt8](repeating: 1, count: 512), at: 1 << 20) == 0)
            #expect(try first.ask(.read, offset: 1 << 20, length: 512) == EINVAL)
            #expect(try second.read(512, at: 1 << 20) == [UInt8](repeating: 1, count: 512))
        }
        await server.stop()
    }

    @Test func listeningFailsWithAReason() async throws {
        let directory = try TemporaryDirectory()
        let loop = try EventLoop(name: "nbd test")
        defer { loop.shutdown() }
        func serve(_ address: NBDListenAddress) throws(SystemError) -> NBDServer<MemoryStore> {
            try NBDServer(loop: loop, exports: [("", MemoryStore(bytes: 1 << 20))], listen: address)
        }
        func refusal(_ address: NBDListenAddress) async -> String? {
            do throws(SystemError) {
                await (try serve(address)).stop()
                return nil
            } catch {
                return error.what
            }
        }
        let long = directory.path + "/" + String(repeating: "x", count: 108)
        #expect(await refusal(.unix(path: long))?.contains("a socket's may have 107") == true)
        #expect(await refusal(.unix(path: "/nonexistent/s"))?.contains("No such file or directory") == true)
        let file = directory.path + "/file"
        _ = FileManager.default.createFile(atPath: file, contents: nil)
        #expect(await refusal(.unix(path: file))?.contains("not a socket is in the way") == true)
        #expect(access(file, F_OK) == 0)

        let path = directory.path + "/s"
        let first = try serve(.unix(path: path))
        #expect(await refusal(.unix(path: path))?.contains("another server is listening there") == true)
        #expect(try RawClient.ready(path: path).read(512, at: 0).count == 512)
        await first.stop()

        // What a killed server leaves behind is replaced.
        let stale = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        _ = withUnixAddress(path) { bind(stale, $0, $1) }
        close(stale)
        #expect(access(path, F_OK) == 0)
        #expect(await refusal(.unix(path: path)) == nil)

        let tcp = try serve(.tcp(host: "127.0.0.1", port: 0))
        let port = try #require(tcp.port)
        #expect(await refusal(.tcp(host: "127.0.0.1", port: port))?.contains("cannot listen on 127.0.0.1:\(port)") == true)
        await tcp.stop()
    }
}

@Suite struct NBDArenaTests {
    @Test func runsAreContiguousDisjointAndComeBack() throws {
        var arena = try NBDArena()
        var random = SplitMix(seed: 7)
        var taken: [(first: Int, count: Int)] = []
        var owner = [Bool](repeating: false, count: NBDArena.chunkCount)
        for _ in 0..<20_000 {
            if random.next() % 2 == 0, !taken.isEmpty {
                let run = taken.remove(at: Int(random.next() % UInt64(taken.count)))
                arena.give(back: run.first, count: run.count)
                for chunk in run.first..<run.first + run.count { owner[chunk] = false }
            } else {
                let count = random.next() % 8 == 0 ? Int(1 + random.next() % 512) : 1
                if let first = arena.take(count) {
                    #expect(first + count <= NBDArena.chunkCount)
                    for chunk in first..<first + count {
                        #expect(!owner[chunk])
                        owner[chunk] = true
                    }
                    taken.append((first, count))
                } else {
                    // First-fit refuses only what does not fit.
                    #expect(longestFreeRun(owner) < count)
                }
            }
            #expect(arena.freeChunkCount == owner.count { !$0 })
        }
    }

    private func longestFreeRun(_ owner: [Bool]) -> Int {
        var longest = 0, run = 0
        for isTaken in owner {
            run = isTaken ? 0 : run + 1
            longest = max(longest, run)
        }
        return longest
    }
}
