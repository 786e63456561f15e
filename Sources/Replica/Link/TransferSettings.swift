import Glibc

/// Whether what is sent is compressed.
public enum CompressionChoice: String, Sendable, Codable, CaseIterable {
    /// Where it makes the stream faster.
    case auto
    case off
    /// Whatever shrinks: for lines that are paid by the byte, or shared.
    case always
}

/// A part of the day with a throttle of its own, in the agent's local time.
public struct ThrottleWindow: Sendable, Codable, Hashable {
    /// Minutes since midnight, 0 to 1439.
    public var startMinute: Int
    /// 0 to 1440; not after the start: it goes on over midnight.
    public var endMinute: Int
    /// Of its start: 1 = Monday … 7 = Sunday; nil: every day.
    public var days: [Int]?
    /// 0 = no limit.
    public var bytesPerSecond: UInt64

    public init(startMinute: Int, endMinute: Int, days: [Int]? = nil, bytesPerSecond: UInt64) {
        self.startMinute = startMinute
        self.endMinute = endMinute
        self.days = days
        self.bytesPerSecond = bytesPerSecond
    }

    /// Whether it makes sense.
    public var isValid: Bool {
        (0..<1440).contains(startMinute) && (0...1440).contains(endMinute) && startMinute != endMinute && (days.map { !$0.isEmpty && $0.allSatisfy((1...7).contains) } ?? true)
    }

    func holds(_ time: DayTime) -> Bool {
        func begins(on day: Int) -> Bool { days?.contains(day) ?? true }
        if startMinute < endMinute { return begins(on: time.weekday) && (startMinute..<endMinute).contains(time.minute) }
        return (begins(on: time.weekday) && time.minute >= startMinute) || (begins(on: time.weekday == 1 ? 7 : time.weekday - 1) && time.minute < endMinute)
    }

    /// The throttle at a time: that of the first window that holds it, else the other one.
    static func bytesPerSecond(_ windows: [ThrottleWindow]?, otherwise: UInt64, at time: @autoclosure () -> DayTime) -> UInt64 {
        guard let windows, !windows.isEmpty else { return otherwise }
        let time = time()
        return windows.first { $0.holds(time) }?.bytesPerSecond ?? otherwise
    }
}

/// A moment of the week, where this process is.
struct DayTime: Hashable {
    /// 1 = Monday … 7 = Sunday.
    var weekday: Int
    /// Since midnight.
    var minute: Int

    static func now() -> DayTime {
        // The time zone may have been changed since the process began.
        tzset()
        var seconds = time(nil), parts = tm()
        localtime_r(&seconds, &parts)
        return DayTime(weekday: parts.tm_wday == 0 ? 7 : Int(parts.tm_wday), minute: Int(parts.tm_hour) * 60 + Int(parts.tm_min))
    }
}

extension ReplicationOrder {
    /// The throttle now.
    var currentBytesPerSecond: UInt64 { ThrottleWindow.bytesPerSecond(throttleWindows, otherwise: throttleBytesPerSecond, at: .now()) }

    /// The other order can be followed without a new stream: only how things are sent differs, not what or where to.
    public func isSameStream(as other: ReplicationOrder) -> Bool {
        var changed = self
        changed.epochMilliseconds = other.epochMilliseconds
        changed.throttleBytesPerSecond = other.throttleBytesPerSecond
        changed.throttleWindows = other.throttleWindows
        changed.compression = other.compression
        return changed == other
    }
}
