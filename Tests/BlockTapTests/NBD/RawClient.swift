import Foundation
import Testing

@testable import BlockTap

/// An NBD client that says exactly what it is told to, right or wrong. Blocking, with a time limit.
final class RawClient: @unchecked Sendable {
    let fd: Int32

    struct Closed: Error {}

    init(path: String) throws {
        fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        guard withUnixAddress(path, { connect(fd, $0, $1) }) == 0 else {
            throw SystemError(errno: errno, doing: "connect to \(path)")
        }
        var limit = timeval(tv_sec: 20, tv_usec: 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    }

    deinit { close(fd) }

    func send(_ bytes: [UInt8]) throws {
        var sent = 0
        while sent < bytes.count {
            let count = bytes.withUnsafeBytes { Foundation.send(fd, $0.baseAddress! + sent, bytes.count - sent, Int32(MSG_NOSIGNAL)) }
            guard count > 0 else { throw Closed() }
            sent += count
        }
    }

    func receive(_ count: Int) throws -> [UInt8] {
        guard count > 0 else { return [] }
        var bytes = [UInt8](repeating: 0, count: count)
        var received = 0
        while received < count {
            let result = bytes.withUnsafeMutableBytes { recv(fd, $0.baseAddress! + received, count - received, 0) }
            guard result > 0 else {
                if result < 0 && (errno == EAGAIN) { throw SystemError(errno: ETIMEDOUT, what: "the server did not answer in time") }
                throw Closed()
            }
            received += result
        }
        return bytes
    }

    func number<T: FixedWidthInteger>(_ type: T.Type = T.self) throws -> T {
        let bytes = try receive(MemoryLayout<T>.size)
        return bytes.withUnsafeBytes { T(bigEndian: $0.loadUnaligned(as: T.self)) }
    }

    /// Whether the server ends the connection (after whatever it still sends).
    func isClosedByServer() -> Bool {
        var scratch = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = recv(fd, &scratch, scratch.count, 0)
            if count == 0 || (count < 0 && errno == ECONNRESET) { return true }
            if count < 0 { return false }
        }
    }

    // MARK: Handshake

    func greet(flags: UInt32 = 3) throws {
        #expect(try number(UInt64.self) == NBD.initMagic)
        #expect(try number(UInt64.self) == NBD.optionMagic)
        #expect(try number(UInt16.self) == 3)
        var bytes: [UInt8] = []
        bytes.append(bigEndian: flags)
        try send(bytes)
    }

    func option(_ option: UInt32, _ data: [UInt8] = []) throws {
        var bytes: [UInt8] = []
        bytes.append(bigEndian: NBD.optionMagic)
        bytes.append(bigEndian: option)
        bytes.append(bigEndian: UInt32(data.count))
        try send(bytes + data)
    }

    func optionReply(to option: UInt32) throws -> (type: NBD.OptionReply?, body: [UInt8]) {
        #expect(try number(UInt64.self) == NBD.optionReplyMagic)
        #expect(try number(UInt32.self) == option)
        let type: UInt32 = try number()
        let length: UInt32 = try number()
        return (NBD.OptionReply(rawValue: type), try receive(Int(length)))
    }

    static func goData(_ name: String, infos: [UInt16] = [3]) -> [UInt8] {
        var data: [UInt8] = []
        data.append(bigEndian: UInt32(name.utf8.count))
        data += Array(name.utf8)
        data.append(bigEndian: UInt16(infos.count))
        for info in infos { data.append(bigEndian: info) }
        return data
    }

    /// The bodies of the INFO replies.
    @discardableResult
    func go(_ name: String = "", option number: UInt32 = 7, infos: [UInt16] = [3]) throws -> [[UInt8]] {
        try option(number, Self.goData(name, infos: infos))
        var bodies: [[UInt8]] = []
        while true {
            let reply = try optionReply(to: number)
            if reply.type == .ack { return bodies }
            try #require(reply.type == .info)
            bodies.append(reply.body)
        }
    }

    static func ready(path: String, export: String = "") throws -> RawClient {
        let client = try RawClient(path: path)
        try client.greet()
        try client.go(export)
        return client
    }

    // MARK: Transmission

    static func header(
        _ type: UInt16, flags: UInt16 = 0, cookie: UInt64, offset: UInt64 = 0, length: UInt32 = 0,
        magic: UInt32 = NBD.requestMagic
    ) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(bigEndian: magic)
        bytes.append(bigEndian: flags)
        bytes.append(bigEndian: type)
        bytes.append(bigEndian: cookie)
        bytes.append(bigEndian: offset)
        bytes.append(bigEndian: length)
        return bytes
    }

    func reply() throws -> (cookie: UInt64, error: Int32) {
        try #require(try number(UInt32.self) == NBD.replyMagic)
        let error: UInt32 = try number()
        return (try number(), Int32(error))
    }

    /// One request and its answer's error.
    func ask(
        _ command: NBD.Command, flags: UInt16 = 0, offset: UInt64 = 0, length: UInt32 = 0, payload: [UInt8] = []
    ) throws -> Int32 {
        let cookie = UInt64.random(in: 0 ... .max)
        try send(Self.header(command.rawValue, flags: flags, cookie: cookie, offset: offset, length: length) + payload)
        let reply = try reply()
        #expect(reply.cookie == cookie)
        return reply.error
    }

    func write(_ bytes: [UInt8], at offset: UInt64, flags: UInt16 = 0) throws -> Int32 {
        try ask(.write, flags: flags, offset: offset, length: UInt32(bytes.count), payload: bytes)
    }

    func read(_ count: Int, at offset: UInt64) throws -> [UInt8] {
        try #require(try ask(.read, offset: offset, length: UInt32(count)) == 0)
        return try receive(count)
    }
}
