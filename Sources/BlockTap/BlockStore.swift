import Glibc

/// What a block server asks of the thing behind it.
public enum BlockOperation: UInt8, Sendable {
    case read, write, flush, trim, writeZeroes

    var changesContent: Bool { self != .read && self != .flush }
}

public struct BlockRequestFlags: OptionSet, Sendable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    /// The request, and nothing less, is on stable storage before it is answered.
    public static let fua = BlockRequestFlags(rawValue: 1)
    /// WRITE_ZEROES must allocate (do not punch a hole).
    public static let noHole = BlockRequestFlags(rawValue: 2)
}

/// One request in flight. Lives in its owner's fixed slab from `submit` until `requestCompleted`; nothing is allocated for it.
///
/// Validated at the edge (the server): offset and length are inside the device, aligned to its logical block, length > 0
/// except for `flush`; `buffer` is page-aligned and `lengthBytes` long for `read` and `write`, nil otherwise.
public struct BlockRequest {
    public var operation: BlockOperation = .read
    public var flags: BlockRequestFlags = []
    public var offsetBytes: UInt64 = 0
    public var lengthBytes: UInt32 = 0
    public var buffer: UnsafeMutableRawPointer? = nil
    /// Who is told; never released while requests are in flight.
    public var owner: Unmanaged<BlockRequestOwner>
    /// The owner's name for this slot.
    public var token: UInt32
    /// For the store's own use while it holds the request.
    public var scratch: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)

    public init(owner: Unmanaged<BlockRequestOwner>, token: UInt32) {
        self.owner = owner
        self.token = token
    }
}

public typealias BlockRequestPointer = UnsafeMutablePointer<BlockRequest>

/// Receives completions; subclassed by servers. A class with a vtable, not an existential.
open class BlockRequestOwner {
    public init() {}
    /// `error` is 0 or a positive errno. Called on the store's event-loop thread, exactly once per submitted request,
    /// possibly before `submit` has returned.
    open func requestCompleted(_ request: BlockRequestPointer, error: Int32) { fatalError("abstract") }
}

extension UnsafeMutablePointer where Pointee == BlockRequest {
    /// Ends the request. `error` is 0 or a positive errno.
    @inlinable public func complete(error: Int32 = 0) {
        pointee.owner._withUnsafeGuaranteedRef { $0.requestCompleted(self, error: error) }
    }
}

/// Anything with blocks behind it: a disk, a tapped disk, a volume at a recovery point, a fork.
///
/// All calls are made on one event-loop thread. Requests complete in any order. A completed `flush` covers every write that
/// completed before the flush was submitted (NBD specification, "Ordering of messages and writes").
public protocol BlockStore: AnyObject {
    var geometry: BlockGeometry { get }
    var isReadOnly: Bool { get }
    /// Whether TRIM and WRITE_ZEROES are worth offering to clients.
    var supportsTrim: Bool { get }
    func submit(_ request: BlockRequestPointer)
}
