import CIoUring
import Glibc

/// Reads of many ranges, many at once, waiting for all of them: the live tap's thread has nothing else to do meanwhile. Confined to one thread.
final class LiveReader {
    private var ring: Ring
    static let depthMax = 1024

    struct Range {
        var fd: Int32
        var offsetBytes: UInt64
        var lengthBytes: Int
        var memory: UnsafeMutableRawPointer
    }

    init() throws(SystemError) { ring = try Ring(entries: UInt32(Self.depthMax)) }

    /// `ended(index, succeeded)` is called right after that range has been read, before the next one is looked at.
    func read(_ ranges: [Range], depth: Int, _ ended: (Int, Bool) -> Void) {
        let depth = min(depth, Self.depthMax)
        withUnsafeTemporaryAllocation(of: ciouring_completion.self, capacity: Ring.reapMax) { completions in
            var next = 0
            var inFlight = 0
            while next < ranges.count || inFlight > 0 {
                while next < ranges.count, inFlight < depth {
                    submit(ranges[next], token: UInt64(next))
                    next += 1
                    inFlight += 1
                }
                ring.submitAndWait()
                for i in 0..<ring.reap(into: completions.baseAddress!) {
                    let index = Int(completions[i].user_data)
                    let result = completions[i].res
                    if result == -EINTR || result == -EAGAIN {
                        submit(ranges[index], token: UInt64(index))
                        continue
                    }
                    inFlight -= 1
                    ended(index, Int(result) == ranges[index].lengthBytes)
                }
            }
        }
    }

    private func submit(_ range: Range, token: UInt64) {
        while !ciouring_prep_read(ring.raw, range.fd, range.memory, UInt32(range.lengthBytes), range.offsetBytes, token) { ring.makeRoom() }
    }
}
