/// A tapped disk's device below, through the event loop's ring. The loop keeps it, the device and `keepAlive` (what its completions
/// reach) until it is shut down: no completion can find them gone.
public final class RingDiskIO: DiskIO {
    private let device: BlockDevice
    private let loop: EventLoop
    private let handler: HandlerID
    private let keepAlive: AnyObject

    private final class Handler: IOHandler {
        var io: RingDiskIO?
        override func ioCompleted(token: UInt32, result: Int32) { io!.completed(token: token, result: result) }
    }

    /// On the loop's thread.
    init(device: BlockDevice, loop: EventLoop, keepAlive: AnyObject) {
        let handler = Handler()
        self.device = device
        self.loop = loop
        self.handler = loop.register(handler)
        self.keepAlive = keepAlive
        super.init()
        handler.io = self
    }

    public override var supportsZeroing: Bool { device.canPunchHoles }

    public override func read(into buffer: UnsafeMutableRawPointer, count: Int, offset: UInt64, token: UInt32) {
        loop.submitRead(fd: device.fd, into: buffer, count: count, offset: offset, handler: handler, token: token)
    }

    public override func write(from buffer: UnsafeRawPointer, count: Int, offset: UInt64, dsync: Bool, token: UInt32) {
        loop.submitWrite(fd: device.fd, from: buffer, count: count, offset: offset, dsync: dsync, handler: handler, token: token)
    }

    public override func zero(offset: UInt64, length: UInt64, allocate: Bool, token: UInt32) {
        loop.submitFallocate(
            fd: device.fd, mode: allocate ? FileAllocation.zeroRange : FileAllocation.punchHole, offset: offset, length: length,
            handler: handler, token: token)
    }

    public override func flush(token: UInt32) {
        loop.submitDataSync(fd: device.fd, handler: handler, token: token)
    }
}
