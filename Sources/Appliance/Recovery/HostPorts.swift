import Foundation
import Glibc

/// Whether ports of this host can be forwarded to a machine: to be known before anything is begun.
enum HostPorts {
    /// `held` are those of a machine that this one replaces.
    static func check(_ forwards: [PortForward], held: [PortForward] = []) throws(ApplianceError) {
        for (index, forward) in forwards.enumerated() {
            let name = "\(forward.hostAddress):\(forward.hostPort)"
            guard let address = IPv4Interface.address(forward.hostAddress) else { throw .invalid("\(forward.hostAddress) is not an IPv4 address") }
            if forwards[..<index].contains(where: { $0.hostAddress == forward.hostAddress && $0.hostPort == forward.hostPort }) {
                throw .invalid("port \(name) is to be forwarded twice")
            }
            if held.contains(where: { $0.hostAddress == forward.hostAddress && $0.hostPort == forward.hostPort }) { continue }
            switch bindError(address, forward.hostPort) {
            case nil: break
            case EADDRINUSE?: throw .refused("Port \(name) of this host is in use: forward another one, or end what listens there (ss -ltnp).")
            case EADDRNOTAVAIL?: throw .refused("\(forward.hostAddress) is not an address of this host (ip address lists them): give it to an interface first, or forward another one.")
            case EACCES?: throw .refused("Port \(name) of this host is only for root: run the appliance as root, or forward one above 1023.")
            case let error?: throw .refused("Port \(name) of this host cannot be had: \(String(cString: strerror(error))).")
            }
        }
    }

    private static func bindError(_ address: UInt32, _ port: UInt16) -> Int32? {
        withSocket(address, port) { fd, address in
            var yes: Int32 = 1
            // As QEMU does: connections of before that linger do not count.
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, socklen_t(MemoryLayout<Int32>.size))
            guard bind(fd, address, socklen_t(MemoryLayout<sockaddr_in>.size)) == 0, listen(fd, 1) == 0 else { return errno }
            return nil
        }
    }

    /// A port of 127.0.0.1 that nobody has now.
    static func free() -> UInt16? {
        withSocket(0x7F00_0001, 0) { fd, address in
            guard bind(fd, address, socklen_t(MemoryLayout<sockaddr_in>.size)) == 0 else { return nil }
            var bound = sockaddr_in()
            var length = socklen_t(MemoryLayout<sockaddr_in>.size)
            let named = withUnsafeMutablePointer(to: &bound) { $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(fd, $0, &length) } }
            return named == 0 ? UInt16(bigEndian: bound.sin_port) : nil
        }
    }

    /// A connection that is open until `body` ends; nil when there was none within so many seconds.
    static func withConnection<T>(
        to address: UInt32, _ port: UInt16, seconds: Double, isolation: isolated (any Actor)? = #isolation, _ body: () async throws -> T
    ) async rethrows -> T? {
        let fd: Int32? = withSocket(address, port, closes: false) { fd, target in
            _ = fcntl(fd, F_SETFL, O_NONBLOCK)
            if connect(fd, target, socklen_t(MemoryLayout<sockaddr_in>.size)) == 0 || errno == EINPROGRESS { return fd }
            close(fd)
            return nil
        }
        guard let fd else { return nil }
        defer { close(fd) }
        let deadline = ContinuousClock.now + .milliseconds(Int(seconds * 1000))
        while true {
            var slot = pollfd(fd: fd, events: Int16(POLLOUT), revents: 0)
            if poll(&slot, 1, 0) > 0 { break }
            if ContinuousClock.now >= deadline || Task.isCancelled { return nil }
            try? await Task.sleep(for: .milliseconds(20))
        }
        var error: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        guard getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0, error == 0 else { return nil }
        return try await body()
    }

    private static func withSocket<T>(_ address: UInt32, _ port: UInt16, closes: Bool = true, _ body: (Int32, UnsafePointer<sockaddr>) -> T?) -> T? {
        let fd = socket(AF_INET, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard fd >= 0 else { return nil }
        defer { if closes { close(fd) } }
        var target = sockaddr_in()
        target.sin_family = sa_family_t(AF_INET)
        target.sin_port = port.bigEndian
        target.sin_addr.s_addr = address.bigEndian
        return withUnsafePointer(to: &target) { $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body(fd, $0) } }
    }
}
