import Glibc

/// A disk as a `BlockStore`, without a tap: requests go straight to the device.
///
/// FLUSH is fdatasync, FUA is RWF_DSYNC (or an fdatasync after TRIM and WRITE_ZEROES). TRIM gives space back where the device can and is
/// otherwise ignored, as the NBD protocol allows. Short transfers are continued here. Lives as long as somebody
/// holds it; nothing may be in flight when it goes.
public final class DeviceStore: BlockStore {
    public let device: BlockDevice
    public let geometry: BlockGeometry
    public let isReadOnly: Bool
    public var supportsTrim: Bool { !isReadOnly }

    private let loop: EventLoop
    private let fd: Int32
    private var handler: HandlerID?
    private var inFlight = RequestTable()

    public init(device: BlockDevice, loop: EventLoop) {
        self.device = device
        self.loop = loop
        fd = device.fd
        geometry = device.geometry
        isReadOnly = device.access == .readOnly
    }

    deinit {
        precondition(inFlight.isEmpty, "a store went while requests were in flight on \(device.path)")
        guard let handler else { return }
        let loop = loop
        if loop.isCurrent { loop.unregister(handler) } else { loop.execute { loop.unregister(handler) } }
    }

    private final class Completions: IOHandler {
        unowned(unsafe) let store: DeviceStore
        init(_ store: DeviceStore) { self.store = store }
        override func ioCompleted(token: UInt32, result: Int32) { store.completed(token: token, result: result) }
    }

    /// What a request is doing, in `scratch.1`; `scratch.0` counts the bytes done.
    private enum Stage: UInt64 {
        case main
        /// Writing zeroes the hard way.
        case zeroing
        /// TRIM or WRITE_ZEROES with FUA: done, not yet durable.
        case syncing
    }

    public func submit(_ request: BlockRequestPointer) {
        request.pointee.scratch = (0, Stage.main.rawValue, 0, 0)
        if request.pointee.operation == .trim && !device.canPunchHoles { return request.complete() }
        go(on: request, token: inFlight.insert(request))
    }

    private func go(on request: BlockRequestPointer, token: UInt32) {
        let handler = handlerID()
        let offset = request.pointee.offsetBytes
        let length = UInt64(request.pointee.lengthBytes)
        let done = request.pointee.scratch.0
        let isDurable = request.pointee.flags.contains(.fua)
        switch Stage(rawValue: request.pointee.scratch.1)! {
        case .syncing:
            loop.submitDataSync(fd: fd, handler: handler, token: token)
        case .zeroing:
            loop.submitWrite(
                fd: fd, from: ZeroPages.start, count: Int(min(length - done, UInt64(ZeroPages.count))), offset: offset + done,
                dsync: isDurable, handler: handler, token: token)
        case .main:
            switch request.pointee.operation {
            case .read:
                loop.submitRead(
                    fd: fd, into: request.pointee.buffer! + Int(done), count: Int(length - done), offset: offset + done,
                    handler: handler, token: token)
            case .write:
                loop.submitWrite(
                    fd: fd, from: request.pointee.buffer! + Int(done), count: Int(length - done), offset: offset + done,
                    dsync: isDurable, handler: handler, token: token)
            case .flush:
                loop.submitDataSync(fd: fd, handler: handler, token: token)
            case .trim:
                loop.submitFallocate(
                    fd: fd, mode: FileAllocation.punchHole, offset: offset, length: length, handler: handler, token: token)
            case .writeZeroes:
                let mayPunch = device.canPunchHoles && !request.pointee.flags.contains(.noHole)
                loop.submitFallocate(
                    fd: fd, mode: mayPunch ? FileAllocation.punchHole : FileAllocation.zeroRange, offset: offset,
                    length: length, handler: handler, token: token)
            }
        }
    }

    private func completed(token: UInt32, result: Int32) {
        let request = inFlight[token]
        if result < 0 { return failed(request, token: token, error: -result) }
        let operation = request.pointee.operation
        let stage = Stage(rawValue: request.pointee.scratch.1)!
        if stage == .zeroing || (stage == .main && (operation == .read || operation == .write)) {
            request.pointee.scratch.0 += UInt64(result)
            if request.pointee.scratch.0 < UInt64(request.pointee.lengthBytes) {
                if result == 0 { return end(request, token: token, error: EIO) }      // the device has shrunk
                return go(on: request, token: token)
            }
        } else if stage == .main && operation != .flush && request.pointee.flags.contains(.fua) {
            request.pointee.scratch.1 = Stage.syncing.rawValue
            return go(on: request, token: token)
        }
        end(request, token: token, error: 0)
    }

    private func failed(_ request: BlockRequestPointer, token: UInt32, error: Int32) {
        switch (error, request.pointee.operation) {
        case (EAGAIN, _), (EINTR, _):
            go(on: request, token: token)
        case (EOPNOTSUPP, .trim):
            end(request, token: token, error: 0)
        case (EOPNOTSUPP, .writeZeroes) where request.pointee.scratch.1 == Stage.main.rawValue:
            request.pointee.scratch.1 = Stage.zeroing.rawValue
            go(on: request, token: token)
        default:
            end(request, token: token, error: error)
        }
    }

    private func end(_ request: BlockRequestPointer, token: UInt32, error: Int32) {
        inFlight.remove(token)
        request.complete(error: error)
    }

    /// Registered at the first request: only the loop's thread may.
    @inline(__always) private func handlerID() -> HandlerID {
        if let handler { return handler }
        let registered = loop.register(Completions(self))
        handler = registered
        return registered
    }
}

/// Requests in flight by token; grows to the largest number ever in flight at once and stays there.
struct RequestTable {
    private var slots: [BlockRequestPointer?] = []
    private var free: [UInt32] = []

    var isEmpty: Bool { free.count == slots.count }

    subscript(token: UInt32) -> BlockRequestPointer { slots[Int(token)]! }

    mutating func insert(_ request: BlockRequestPointer) -> UInt32 {
        if let token = free.popLast() {
            slots[Int(token)] = request
            return token
        }
        slots.append(request)
        free.reserveCapacity(slots.capacity)
        return UInt32(slots.count - 1)
    }

    mutating func remove(_ token: UInt32) {
        slots[Int(token)] = nil
        free.append(token)
    }
}

/// Page-aligned zeroes to write from.
enum ZeroPages {
    static let count = 1 << 20
    nonisolated(unsafe) static let start: UnsafeRawPointer = {
        let pages = mmap(nil, count, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        precondition(pages != MAP_FAILED, "no memory for \(count) bytes of zeroes")
        return UnsafeRawPointer(pages!)
    }()
}
