import Foundation
import Testing

@testable import BlockTap

/// Bytes that differ with the seed and, from one 8 KiB to the next, with the place.
private func pattern(_ seed: UInt8, _ count: Int) -> [UInt8] {
    let piece = (0..<8192).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 / 512) ^ seed }
    var bytes: [UInt8] = []
    bytes.reserveCapacity(count + piece.count)
    while bytes.count < count {
        let start = bytes.count
        bytes += piece
        bytes[start + 1] = UInt8(truncatingIfNeeded: start >> 13)
        bytes[start + 2] = UInt8(truncatingIfNeeded: start >> 21)
    }
    bytes.removeLast(bytes.count - count)
    return bytes
}

private let fua: UInt16 = 1
private let noHole: UInt16 = 2

@Suite(.serialized) struct NBDTransmissionTests {
    @Test(arguments: Backing.available) func readsBackWhatWasWritten(_ backing: Backing) async throws {
        try await serve(backing) { served in
            let client = try served.client()
            #expect(try client.write(pattern(1, 4096), at: 8192) == 0)
            #expect(try client.write(pattern(2, 512), at: 512, flags: fua) == 0)
            #expect(try client.ask(.flush) == 0)
            #expect(try client.ask(.flush, flags: fua) == 0)
            #expect(try client.read(4096, at: 8192) == pattern(1, 4096))
            #expect(try client.read(512, at: 512) == pattern(2, 512))
            // The last block of the disk.
            #expect(try client.write(pattern(3, 512), at: (4 << 20) - 512) == 0)
            #expect(try client.read(1024, at: (4 << 20) - 1024).suffix(512) == pattern(3, 512)[...])
            // Another connection sees the same disk.
            #expect(try served.client(export: "disk").read(4096, at: 8192) == pattern(1, 4096))
        }
    }

    @Test(arguments: Backing.available) func trimmedAndZeroedRangesReadAsZero(_ backing: Backing) async throws {
        try await serve(backing) { served in
            let client = try served.client()
            let filled = pattern(9, 65536)
            for (command, flags) in [
                (NBD.Command.trim, UInt16(0)), (.trim, fua), (.writeZeroes, 0), (.writeZeroes, noHole), (.writeZeroes, fua | noHole),
            ] {
                #expect(try client.write(filled, at: 0) == 0)
                #expect(try client.ask(command, flags: flags, offset: 4096, length: 8192 + 512) == 0)
                let read = try client.read(65536, at: 0)
                #expect(read[..<4096] == filled[..<4096])
                #expect(read[4096..<(12288 + 512)].allSatisfy { $0 == 0 })
                #expect(read[(12288 + 512)...] == filled[(12288 + 512)...])
            }
        }
    }

    @Test(arguments: Backing.available) func wrongRequestsGetTheirErrnoAndTheConnectionGoesOn(_ backing: Backing) async throws {
        try await serve(backing) { served in
            let client = try served.client()
            let size = UInt64(4 << 20)
            let block = pattern(5, 512)
            func goesOn() throws {
                #expect(try client.write(block, at: 0) == 0)
                #expect(try client.read(512, at: 0) == block)
            }
            // Past the end.
            #expect(try client.ask(.read, offset: size, length: 512) == EINVAL)
            #expect(try client.ask(.read, offset: size - 512, length: 1024) == EINVAL)
            #expect(try client.ask(.read, offset: .max - 511, length: 1024) == EINVAL)
            #expect(try client.ask(.trim, offset: size - 512, length: 1024) == EINVAL)
            #expect(try client.write(block + block, at: size - 512) == ENOSPC)
            #expect(try client.write(block, at: .max - 511) == ENOSPC)
            #expect(try client.ask(.writeZeroes, offset: size, length: 512) == ENOSPC)
            try goesOn()
            // Not aligned, empty.
            #expect(try client.ask(.read, offset: 100, length: 512) == EINVAL)
            #expect(try client.ask(.read, offset: 0, length: 100) == EINVAL)
            #expect(try client.write(pattern(1, 100), at: 0) == EINVAL)
            #expect(try client.write(block, at: 1) == EINVAL)
            for command in [NBD.Command.read, .write, .trim, .writeZeroes] {
                #expect(try client.ask(command, offset: 0, length: 0) == EINVAL)
            }
            #expect(try client.ask(.flush, offset: 512) == EINVAL)
            #expect(try client.ask(.flush, length: 512) == EINVAL)
            try goesOn()
            // Unknown commands and flags.
            for type: UInt16 in [5, 7, 8, 100, .max] {
                try client.send(RawClient.header(type, cookie: 77, length: 512))
                let reply = try client.reply()
                #expect(reply.error == EINVAL && reply.cookie == 77)
            }
            #expect(try client.ask(.read, flags: noHole, length: 512) == EINVAL)
            #expect(try client.ask(.read, flags: 1 << 2, length: 512) == EINVAL)
            #expect(try client.write(block, at: 0, flags: noHole) == EINVAL)
            #expect(try client.ask(.writeZeroes, flags: 1 << 4, length: 512) == EINVAL)
            #expect(try client.ask(.flush, flags: 1 << 7) == EINVAL)
            try goesOn()
        }
    }

    @Test(arguments: Backing.available) func aReadOnlyDiskRefusesEveryWrite(_ backing: Backing) async throws {
        try await serve(backing, isReadOnly: true) { served in
            let client = try RawClient(path: served.socket)
            try client.greet()
            let export = try #require(try client.go().first)
            let flags = NBD.TransmissionFlags(rawValue: UInt16(export[10]) << 8 | UInt16(export[11]))
            #expect(flags.contains([.readOnly, .sendFlush, .canMultiConn]))
            #expect(flags.isDisjoint(with: [.sendTrim, .sendWriteZeroes]))
            #expect(try client.write(pattern(1, 4096), at: 0) == EPERM)
            #expect(try client.ask(.trim, offset: 0, length: 512) == EPERM)
            #expect(try client.ask(.writeZeroes, offset: 0, length: 512) == EPERM)
            #expect(try client.ask(.flush) == 0)
            #expect(try client.read(4096, at: 0) == [UInt8](repeating: 0, count: 4096))
        }
    }

    @Test func largestRequestsWorkAndLargerOnesAreRefused() async throws {
        try await serve(.file, bytes: 80 << 20) { served in
            let client = try served.client()
            let big = pattern(7, 32 << 20)
            #expect(try client.write(big, at: 1 << 20) == 0)
            #expect(try client.read(32 << 20, at: 1 << 20) == big)
            #expect(try client.ask(.read, offset: 0, length: (32 << 20) + 512) == EINVAL)
            #expect(try client.write(pattern(8, (32 << 20) + 512), at: 0) == EINVAL)
            #expect(try client.read(512, at: 0) == [UInt8](repeating: 0, count: 512))
            #expect(try client.ask(.trim, offset: 0, length: 64 << 20) == 0)
            #expect(try client.read(512, at: 1 << 20) == [UInt8](repeating: 0, count: 512))
        }
    }

    @Test(arguments: [1, 7, 27, 28, 29, 4096, 70_000, 300_000])
    func messagesMayArriveInPiecesOfAnySize(_ pieceBytes: Int) async throws {
        try await serve(.memory) { served in
            let client = try served.client()
            let sizes = pieceBytes < 100 ? [512, 1024] : [512, 4096, 65536, 262_144, 512, 1 << 20, 512]
            var message: [UInt8] = []
            for (index, size) in sizes.enumerated() {
                message += RawClient.header(1, cookie: UInt64(index), offset: UInt64(index) << 9, length: UInt32(size))
                message += pattern(UInt8(index), size)
                message += RawClient.header(0, cookie: 1000 + UInt64(index), offset: UInt64(index) << 9, length: UInt32(size))
            }
            var rest = message[...]
            while !rest.isEmpty {
                try client.send(Array(rest.prefix(pieceBytes)))
                rest = rest.dropFirst(pieceBytes)
            }
            for (index, size) in sizes.enumerated() {
                #expect(try client.reply() == (UInt64(index), 0))
                #expect(try client.reply() == (1000 + UInt64(index), 0))
                #expect(try client.receive(size) == pattern(UInt8(index), size))
            }
        }
    }

    @Test(arguments: Backing.available) func manyPipelinedRequestsAreAllAnswered(_ backing: Backing) async throws {
        try await serve(backing) { served in
            let client = try served.client()
            var random = SplitMix(seed: 42)
            var model = [UInt8](repeating: 0, count: 4 << 20)
            for _ in 0..<8 {
                // Writes to distinct places, all at once, then reads of the same.
                var message: [UInt8] = []
                var places: [(offset: Int, count: Int)] = []
                for slot in 0..<64 {
                    let offset = slot << 16
                    let count = 512 * Int(1 + random.next() % 128)
                    let bytes = pattern(UInt8(truncatingIfNeeded: random.next()), count)
                    message += RawClient.header(1, flags: UInt16(random.next() % 2), cookie: UInt64(slot), offset: UInt64(offset), length: UInt32(count))
                    message += bytes
                    model.replaceSubrange(offset..<offset + count, with: bytes)
                    places.append((offset, count))
                }
                try client.send(message)
                var answered = Set<UInt64>()
                for _ in places {
                    let reply = try client.reply()
                    #expect(reply.error == 0)
                    answered.insert(reply.cookie)
                }
                #expect(answered.count == places.count)
                message = []
                for (slot, place) in places.enumerated() {
                    message += RawClient.header(0, cookie: UInt64(slot), offset: UInt64(place.offset), length: UInt32(place.count))
                }
                try client.send(message)
                for _ in places {
                    let reply = try client.reply()
                    let place = places[Int(reply.cookie)]
                    #expect(try client.receive(place.count) == Array(model[place.offset..<place.offset + place.count]))
                }
            }
        }
    }

    @Test(arguments: Backing.available) func disconnectAndHalfCloseFinishWhatWasAsked(_ backing: Backing) async throws {
        try await serve(backing) { served in
            for isPolite in [true, false] {
                let client = try served.client()
                var message: [UInt8] = []
                for cookie in 0..<100 as Range<UInt64> {
                    message += RawClient.header(1, cookie: cookie, offset: cookie * 4096, length: 4096) + pattern(UInt8(cookie), 4096)
                }
                if isPolite { message += RawClient.header(2, cookie: 0) }
                try client.send(message)
                if !isPolite { shutdown(client.fd, Int32(SHUT_WR)) }
                for _ in 0..<100 { #expect(try client.reply().error == 0) }
                #expect(client.isClosedByServer())
            }
            #expect(try served.client().read(4096, at: 99 * 4096) == pattern(99, 4096))
        }
    }
}
