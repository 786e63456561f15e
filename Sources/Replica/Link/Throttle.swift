/// Token bucket in bytes per second. Holds at most a quarter of a second's bytes; may go into debt by one frame.
struct Throttle {
    /// 0 = no limit.
    private(set) var bytesPerSecond: UInt64
    private var tokens: Double
    private var last: Int64?

    init(bytesPerSecond: UInt64) {
        self.bytesPerSecond = bytesPerSecond
        tokens = Double(bytesPerSecond) / 4
    }

    /// From now on. Of a debt no more stays than what a quarter of a second pays at the new rate; without a limit there was none.
    mutating func set(bytesPerSecond: UInt64) {
        let limit = Double(bytesPerSecond) / 4
        tokens = self.bytesPerSecond == 0 ? 0 : min(max(tokens, -limit), limit)
        self.bytesPerSecond = bytesPerSecond
    }

    /// Nanoseconds to wait before the next frame may be sent; 0 = now.
    mutating func delay(now: Int64) -> Int64 {
        guard bytesPerSecond > 0 else { return 0 }
        if let last { tokens = min(tokens + Double(now - last) / 1e9 * Double(bytesPerSecond), Double(bytesPerSecond) / 4) }
        last = now
        return tokens > 0 ? 0 : Int64(-tokens / Double(bytesPerSecond) * 1e9) + 1_000_000
    }

    mutating func spend(_ bytes: Int) { tokens -= Double(bytes) }

    /// Frames are kept small enough that a slow link stays smooth.
    var frameBytes: Int {
        bytesPerSecond == 0 ? FrameLimits.batchBytes : min(FrameLimits.batchBytes, max(64 * 1024, Int(clamping: bytesPerSecond / 8)))
    }
}
