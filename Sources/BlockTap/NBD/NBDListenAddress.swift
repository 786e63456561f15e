import Glibc

/// Where an NBD server listens.
public enum NBDListenAddress: Sendable, Hashable, CustomStringConvertible {
    case unix(path: String)
    /// Port 0 takes a free one; see `NBDServer.port`.
    case tcp(host: String, port: UInt16)

    /// Largest length of a unix socket's path in bytes (`sun_path` less its final zero).
    public static let unixPathBytesMax = 107

    public var description: String {
        switch self {
        case .unix(let path): path
        case .tcp(let host, let port): "\(host):\(port)"
        }
    }

    /// A listening socket. A unix socket that nobody listens on any more is replaced; it is only for its owner to connect to.
    func listen() throws(SystemError) -> Int32 {
        switch self {
        case .unix(let path): try Self.listenUnix(path)
        case .tcp(let host, let port): try Self.listenTCP(host: host, port: port)
        }
    }

    private static func listenUnix(_ path: String) throws(SystemError) -> Int32 {
        func refuse(_ error: Int32, _ reason: String) -> SystemError {
            SystemError(errno: error, what: "cannot listen on \(path): \(reason)")
        }
        guard path.utf8.count <= unixPathBytesMax else {
            throw refuse(
                ENAMETOOLONG,
                "the path has \(path.utf8.count) bytes, a socket's may have \(unixPathBytesMax) (use a shorter directory)")
        }
        var facts = stat()
        if lstat(path, &facts) == 0 {
            guard facts.st_mode & S_IFMT == S_IFSOCK else {
                throw refuse(EEXIST, "something that is not a socket is in the way (remove it)")
            }
            guard !isAnswering(path) else {
                throw refuse(EADDRINUSE, "another server is listening there (stop it first)")
            }
            unlink(path)
        }
        let fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard fd >= 0 else { throw refuse(errno, SystemError.text(of: errno)) }
        guard withUnixAddress(path, { bind(fd, $0, $1) }) == 0 else {
            let error = errno
            close(fd)
            throw refuse(error, SystemError.text(of: error))
        }
        guard chmod(path, 0o600) == 0, Glibc.listen(fd, 128) == 0 else {
            let error = errno
            close(fd)
            unlink(path)
            throw refuse(error, SystemError.text(of: error))
        }
        return fd
    }

    private static func isAnswering(_ path: String) -> Bool {
        let type = SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue
        let fd = socket(AF_UNIX, Int32(type), 0)
        guard fd >= 0 else { return true }
        defer { close(fd) }
        return withUnixAddress(path) { connect(fd, $0, $1) } == 0 || errno == EAGAIN     // EAGAIN: a queue of clients
    }

    private static func listenTCP(host: String, port: UInt16) throws(SystemError) -> Int32 {
        var hints = addrinfo()
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV
        var found: UnsafeMutablePointer<addrinfo>?
        let result = getaddrinfo(host.isEmpty ? nil : host, String(port), &hints, &found)
        guard result == 0, let found else {
            throw SystemError(
                errno: EADDRNOTAVAIL, what: "cannot listen on \(host):\(port): \(String(cString: gai_strerror(result)))")
        }
        defer { freeaddrinfo(found) }
        let fd = socket(found.pointee.ai_family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard fd >= 0 else { throw SystemError(errno: errno, doing: "listen on \(host):\(port)") }
        var one: Int32 = 1
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, socklen_t(MemoryLayout<Int32>.size))
        guard bind(fd, found.pointee.ai_addr, found.pointee.ai_addrlen) == 0, Glibc.listen(fd, 128) == 0 else {
            let error = errno
            close(fd)
            throw SystemError(errno: error, doing: "listen on \(host):\(port)")
        }
        return fd
    }

    /// The port that a TCP socket is bound to.
    static func port(of fd: Int32) -> UInt16? {
        var address = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        return withUnsafeMutablePointer(to: &address) { pointer -> UInt16? in
            _ = pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(fd, $0, &length) }
            switch Int32(pointer.pointee.ss_family) {
            case AF_INET:
                return pointer.withMemoryRebound(to: sockaddr_in.self, capacity: 1) { UInt16(bigEndian: $0.pointee.sin_port) }
            case AF_INET6:
                return pointer.withMemoryRebound(to: sockaddr_in6.self, capacity: 1) { UInt16(bigEndian: $0.pointee.sin6_port) }
            default:
                return nil
            }
        }
    }
}

/// Calls `body` with the address of a unix socket; `path` has at most `NBDListenAddress.unixPathBytesMax` bytes.
func withUnixAddress(_ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    return withUnsafePointer(to: &address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
    }
}
