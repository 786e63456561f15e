import Glibc

/// The memory of a server's requests: fixed, page-aligned, in chunks, handed out contiguously and first-fit so that
/// light load stays on the same few warm pages.
struct NBDArena: ~Copyable {
    static let chunkBytes = 64 << 10
    static let chunkCount = 1024
    static let totalBytes = chunkBytes * chunkCount
    /// Largest READ or WRITE: the maximum block size that clients are told.
    static let requestBytesMax = 32 << 20
    /// The part worth pinning for the ring; first-fit keeps small requests inside it.
    static let pinnedBytes = 8 << 20

    let base: UnsafeMutableRawPointer
    /// One bit per chunk, set when free.
    private let free: UnsafeMutablePointer<UInt64>
    private static let wordCount = chunkCount / 64

    init() throws(SystemError) {
        let memory = mmap(nil, Self.totalBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard let memory, memory != MAP_FAILED else {
            throw SystemError(errno: errno, doing: "get \(Self.totalBytes >> 20) MiB of memory for NBD requests")
        }
        base = memory
        free = .allocate(capacity: Self.wordCount)
        free.initialize(repeating: .max, count: Self.wordCount)
    }

    deinit {
        munmap(base, Self.totalBytes)
        free.deallocate()
    }

    @inline(__always) static func chunks(for bytes: Int) -> Int { (bytes &+ chunkBytes &- 1) / chunkBytes }

    @inline(__always) func pointer(chunk: Int) -> UnsafeMutableRawPointer { base + chunk &* Self.chunkBytes }

    /// First of `count` contiguous free chunks, now taken; nil when there is no such run.
    mutating func take(_ count: Int) -> Int? {
        if count == 1 {
            for word in 0..<Self.wordCount where free[word] != 0 {
                let bit = free[word].trailingZeroBitCount
                free[word] &= ~(1 &<< UInt64(bit))
                return word * 64 + bit
            }
            return nil
        }
        var run = 0
        var chunk = 0
        while chunk < Self.chunkCount {
            let word = free[chunk / 64]
            if chunk % 64 == 0 && (word == 0 || word == .max) {
                run = word == 0 ? 0 : run + 64
                chunk += 64
            } else {
                run = word & (1 &<< UInt64(chunk % 64)) == 0 ? 0 : run + 1
                chunk += 1
            }
            if run >= count {
                let first = chunk - run
                for taken in first..<first + count { free[taken / 64] &= ~(1 &<< UInt64(taken % 64)) }
                return first
            }
        }
        return nil
    }

    mutating func give(back first: Int, count: Int) {
        for chunk in first..<first + count {
            let bit: UInt64 = 1 &<< UInt64(chunk % 64)
            precondition(free[chunk / 64] & bit == 0, "chunk \(chunk) was not taken")
            free[chunk / 64] |= bit
        }
    }

    var freeChunkCount: Int { (0..<Self.wordCount).reduce(0) { $0 + free[$1].nonzeroBitCount } }
}
