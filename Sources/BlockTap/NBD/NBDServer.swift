import Glibc

/// Serves stores of one type as NBD exports: fixed newstyle; READ, WRITE, FLUSH, FUA, TRIM, WRITE_ZEROES, DISC; no TLS, no structured
/// replies. Everything happens on the event loop, which must be the stores' own.
///
/// A client that sends nonsense loses its connection and nobody else notices. Memory is fixed (`NBDArena`, `NBDSlab`); when it is
/// used up the sockets are not read until some of it comes back. Call `stop` before letting go of it and before the loop's shutdown.
public final class NBDServer<Store: BlockStore>: @unchecked Sendable {
    public let address: NBDListenAddress
    /// The TCP port that is listened on; nil for a unix socket.
    public let port: UInt16?
    private let core: NBDServerCore

    /// Listens when it returns. Any thread.
    ///
    /// - `exports`: at least one; the empty name in a request means the first, unless one is named so.
    /// - `log`: told of connections that were refused or closed for cause; called on the loop's thread.
    ///
    /// Throws when the address cannot be listened on.
    public init(
        loop: EventLoop, exports: [(name: String, store: Store)], listen address: NBDListenAddress,
        log: @escaping @Sendable (String) -> Void = { _ in }
    ) throws(SystemError) {
        precondition(!exports.isEmpty, "an NBD server needs an export")
        let fd = try address.listen()
        self.address = address
        port = NBDListenAddress.port(of: fd)
        do throws(SystemError) {
            core = try NBDServerCore(
                loop: loop, exports: exports.map { NBDStoreExport(name: $0.name, store: $0.store) }, listener: fd,
                address: address, log: log)
        } catch {
            close(fd)
            if case .unix(let path) = address { unlink(path) }
            throw error
        }
        let core = core
        loop.execute { core.start() }
    }

    /// Stops listening (the unix socket's path goes), lets every connection finish the requests in flight, then closes it. A client
    /// that does not take its replies is cut off after a few seconds. Returns when all is closed; idempotent.
    public func stop() async {
        let core = core
        await withUnsafeContinuation { continuation in
            let accepted = core.loop.execute { core.stop { continuation.resume() } }
            if !accepted { continuation.resume() }
        }
    }

    /// Connected clients, those still in the handshake included.
    public var connectionCount: Int {
        get async {
            let core = core
            return await core.loop.run { core.connectionCount }
        }
    }
}
