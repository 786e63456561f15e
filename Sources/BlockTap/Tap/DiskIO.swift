/// The device below a tap. Abstract: the real one is `RingDiskIO`; simulations land writes when they like.
///
/// Every call is answered exactly once through `completed(token, bytes or -errno)`, on the tap's thread, never from inside the call.
open class DiskIO {
    /// Set by the tap that owns this device.
    var disk: Unmanaged<TappedDisk>?

    public init() {}

    /// Whether `zero` is worth offering to clients.
    open var supportsZeroing: Bool { true }

    open func read(into buffer: UnsafeMutableRawPointer, count: Int, offset: UInt64, token: UInt32) { fatalError("abstract") }
    open func write(from buffer: UnsafeRawPointer, count: Int, offset: UInt64, dsync: Bool, token: UInt32) { fatalError("abstract") }
    /// Makes the range read as zeroes; `allocate` keeps the space. Answers -EOPNOTSUPP where the device cannot.
    open func zero(offset: UInt64, length: UInt64, allocate: Bool, token: UInt32) { fatalError("abstract") }
    open func flush(token: UInt32) { fatalError("abstract") }

    public final func completed(token: UInt32, result: Int32) {
        disk!._withUnsafeGuaranteedRef { $0.ioCompleted(token: token, result: result) }
    }
}
