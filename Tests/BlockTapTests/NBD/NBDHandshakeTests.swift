import Foundation
import Testing

@testable import BlockTap

@Suite(.serialized) struct NBDHandshakeTests {
    @Test func goTellsSizeFlagsBlockSizesAndName() async throws {
        try await serve(.memory) { served in
            let client = try RawClient(path: served.socket)
            try client.greet()
            let expectedSizes: [UInt8] = [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]
            let infos = try client.go("disk", option: 6, infos: [0, 1, 3, 999])
            #expect(infos.count == 3)
            #expect(infos[0].prefix(10) == [0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0])
            let flags = NBD.TransmissionFlags(rawValue: UInt16(infos[0][10]) << 8 | UInt16(infos[0][11]))
            #expect(flags == [.hasFlags, .sendFlush, .sendFUA, .sendTrim, .sendWriteZeroes, .canMultiConn])
            #expect(infos[1] == expectedSizes)
            #expect(infos[2] == [0, 1] + Array("disk".utf8))
            // After INFO the handshake goes on.
            #expect(try client.go("", infos: []).count == 2)
            #expect(try client.read(512, at: 0).count == 512)
        }
    }

    @Test func listNamesTheExportsAndAbortIsAcknowledged() async throws {
        try await serve(.memory) { served in
            let client = try RawClient(path: served.socket)
            try client.greet()
            try client.option(3)
            let first = try client.optionReply(to: 3)
            #expect(first.type == .server && first.body == [0, 0, 0, 4] + Array("disk".utf8))
            #expect(try client.optionReply(to: 3).type == .ack)
            try client.option(3, [1])
            #expect(try client.optionReply(to: 3).type == .errorInvalid)
            try client.option(2)
            #expect(try client.optionReply(to: 2).type == .ack)
            #expect(client.isClosedByServer())
        }
    }

    @Test func whatIsNotSupportedIsRefusedPolitely() async throws {
        try await serve(.memory) { served in
            let client = try RawClient(path: served.socket)
            try client.greet()
            for option: UInt32 in [5, 8, 9, 10, 4, 77, .max] {
                try client.option(option, option == 10 ? [1, 2, 3] : [])
                #expect(try client.optionReply(to: option).type == .errorUnsupported)
            }
            try client.option(7, RawClient.goData("nosuch"))
            #expect(try client.optionReply(to: 7).type == .errorUnknown)
            for malformed in [[], [0, 0, 0, 200, 0, 0], RawClient.goData("disk") + [0], [0xff, 0xff, 0xff, 0xff, 0, 0]] as [[UInt8]] {
                try client.option(7, malformed)
                #expect(try client.optionReply(to: 7).type == .errorInvalid)
            }
            try client.go("disk")
            #expect(try client.read(512, at: 0).count == 512)
        }
    }

    @Test func pipelinedOptionsAreAnsweredInOrder() async throws {
        try await serve(.memory) { served in
            let client = try RawClient(path: served.socket)
            try client.greet()
            for option in 100..<400 as Range<UInt32> { try client.option(option) }
            try client.option(7, RawClient.goData(""))
            try client.send(RawClient.header(0, cookie: 5, length: 512))
            for option in 100..<400 as Range<UInt32> { #expect(try client.optionReply(to: option).type == .errorUnsupported) }
            while try client.optionReply(to: 7).type != .ack {}
            #expect(try client.reply() == (5, 0))
        }
    }

    @Test(arguments: [(UInt32(1), 124), (3, 0)]) func exportNameOfOldClientsWorks(_ flags: UInt32, _ zeroes: Int) async throws {
        try await serve(.memory) { served in
            let client = try RawClient(path: served.socket)
            try client.greet(flags: flags)
            try client.option(1, Array("disk".utf8))
            #expect(try client.number(UInt64.self) == 4 << 20)
            _ = try client.number(UInt16.self)
            #expect(try client.receive(zeroes).allSatisfy { $0 == 0 })
            #expect(try client.read(512, at: 0).count == 512)

            let wrong = try RawClient(path: served.socket)
            try wrong.greet(flags: flags)
            try wrong.option(1, Array("nosuch".utf8))
            #expect(wrong.isClosedByServer())
            #expect(served.log.all.contains { $0.contains("no export named 'nosuch'") })
        }
    }
}

@Suite(.serialized) struct NBDGarbageTests {
    /// Each kind of nonsense costs its sender the connection, is logged, and leaves a neighbour alone.
    @Test func nonsenseClosesOnlyItsOwnConnection() async throws {
        try await serve(.memory) { served in
            let neighbour = try served.client()
            #expect(try neighbour.write([UInt8](repeating: 7, count: 512), at: 0) == 0)
            func nonsense(_ expected: String, _ say: (RawClient) throws -> Void) throws {
                let client = try RawClient(path: served.socket)
                try say(client)
                #expect(client.isClosedByServer())
                #expect(served.log.all.last?.contains(expected) == true, "\(served.log.all.last ?? "no log") instead of \(expected)")
                #expect(try neighbour.read(512, at: 0) == [UInt8](repeating: 7, count: 512))
            }
            try nonsense("unknown handshake flags") { try $0.greet(flags: 0xffff_ffff) }
            try nonsense("unknown handshake flags") { try $0.send(Array("GET / HTTP/1.1\r\n\r\n".utf8)) }
            try nonsense("not an NBD option") { try $0.greet(); try $0.send(Array("GET / HTTP/1.1\r\nHost: x\r\n\r\n".utf8)) }
            try nonsense("more than") {
                try $0.greet()
                var bytes: [UInt8] = []
                bytes.append(bigEndian: NBD.optionMagic)
                bytes.append(bigEndian: UInt32(7))
                bytes.append(bigEndian: UInt32.max)
                try $0.send(bytes)
            }
            try nonsense("not an NBD request") {
                try $0.greet(); try $0.go()
                try $0.send([UInt8](repeating: 0xAA, count: 100))
            }
            try nonsense("not an NBD request") {
                try $0.greet(); try $0.go()
                try $0.send(RawClient.header(0, cookie: 1, length: 512) + RawClient.header(0, cookie: 2, length: 512, magic: 1))
            }
            try nonsense("in the middle of a message") {
                try $0.greet(); try $0.go()
                try $0.send(RawClient.header(1, cookie: 1, length: 65536) + [1, 2, 3])
                shutdown($0.fd, Int32(SHUT_WR))
            }
        }
    }

    @Test(arguments: 1...8 as ClosedRange<UInt64>) func randomBytesAtAnyStageHurtNobody(_ seed: UInt64) async throws {
        try await serve(.memory) { served in
            var random = SplitMix(seed: seed)
            let neighbour = try served.client()
            for _ in 0..<40 {
                let client = try RawClient(path: served.socket)
                let stage = random.next() % 3
                if stage > 0 { try client.greet() }
                if stage > 1 { try client.go() }
                var bytes = (0..<Int(random.next() % 5000)).map { _ in UInt8(truncatingIfNeeded: random.next()) }
                // Often a good beginning, so that the nonsense reaches further.
                if random.next() % 2 == 0 {
                    bytes = RawClient.header(UInt16(random.next() % 9), flags: UInt16(random.next() % 4), cookie: 1, offset: random.next() % (8 << 20), length: UInt32(random.next() % 100_000)) + bytes
                }
                try? client.send(bytes)
                shutdown(client.fd, Int32(SHUT_WR))
                #expect(client.isClosedByServer(), "seed \(seed)")
            }
            #expect(try neighbour.read(4096, at: 0).count == 4096)
        }
    }
}
