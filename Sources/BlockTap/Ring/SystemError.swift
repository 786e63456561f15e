import Glibc

/// A system call that failed, told to a person: what failed, on what, and what to do about it.
public struct SystemError: Error, Equatable, CustomStringConvertible {
    /// A positive errno value; `EINVAL` and the like where this code, not the kernel, refused.
    public var errno: Int32
    /// A full sentence without a final stop: `cannot open /dev/sdb: it is mounted on /data`.
    public var what: String

    public init(errno: Int32, what: String) {
        self.errno = errno
        self.what = what
    }

    /// `cannot open /dev/sdb: Permission denied`.
    public init(errno: Int32, doing action: String) {
        self.init(errno: errno, what: "cannot \(action): \(SystemError.text(of: errno))")
    }

    public var description: String { what }

    /// The system's words for an errno.
    public static func text(of errno: Int32) -> String {
        withUnsafeTemporaryAllocation(of: CChar.self, capacity: 256) { buffer in
            guard strerror_r(errno, buffer.baseAddress!, buffer.count) == 0 else { return "error \(errno)" }
            return String(cString: buffer.baseAddress!)
        }
    }
}
