import CIoUring
import CLiveTap
import Glibc
import Synchronization

/// What a self-test of the live tap saw.
public struct LiveTapSelfTest: Sendable, Codable, Hashable, CustomStringConvertible {
    public var kernel = ""
    public var writeCount: UInt64 = 0
    public var discardCount: UInt64 = 0
    public var cutCount: UInt64 = 0
    public var provenCount: UInt64 = 0
    public var issuedCount: UInt64 = 0
    public var completedCount: UInt64 = 0
    /// Completions that the kernel did not show: they cost reads, not points.
    public var unseenCompletionCount: UInt64 = 0
    /// Times that the kernel skipped a copy of a program because it would have interrupted itself.
    public var recursionMissCount: UInt64 = 0
    public var milliseconds: Double = 0
    public init() {}

    public var description: String {
        "\(writeCount) writes and \(discardCount) discards all seen, \(provenCount) of \(cutCount) cuts proven; of \(completedCount) completions the kernel did not show "
            + "\(unseenCompletionCount) (harmless)"
    }
}

extension LiveTapGroup {
    /// Tries the live tap on this kernel: a scratch loop device over memory, written by several threads at once, discarded, and carried to an image that
    /// must be the device in the end, with nothing but marked blocks ever read. Takes about a second; leaves nothing behind, not even when it is killed, but
    /// for a directory in the bpffs that the next one removes.
    ///
    /// `bpffs`: where the kernel's half is pinned meanwhile; mounted if it is not. Throws, in words, why the live tap cannot be trusted here.
    public static func selfTest(bpffs: String = "/sys/fs/bpf") async throws -> LiveTapSelfTest {
        try await selfTest(bpffs: bpffs, faults: [], issues: (0, 0), completions: (0, 0))
    }

    package static func selfTest(
        bpffs: String, faults: LiveTapFaults, issues: (period: UInt64, burst: UInt64), completions: (period: UInt64, burst: UInt64)
    ) async throws -> LiveTapSelfTest {
        guard LiveTapAttachment.isAvailable else { throw LiveSelfTest.refuse("this build has no live tap: its BPF program was not compiled (run tools/lib/bpf.sh, then build again)") }
        guard isAvailable else { throw LiveSelfTest.refuse("this kernel has no BTF (/sys/kernel/btf/vmlinux; CONFIG_DEBUG_INFO_BTF)") }
        try Self.bpffs(at: bpffs)
        LiveSelfTest.removeStale(bpffs)
        var kernel = utsname()
        uname(&kernel)
        let pins = bpffs + "/" + LiveSelfTest.prefix + "\(getpid())-\(LiveSelfTest.turn.add(1, ordering: .relaxed).newValue)"
        let began = LiveReconciliation.now()
        let test = try LiveSelfTest()
        defer { detach(pinDirectory: pins) }
        var configuration = LiveTapConfiguration()
        configuration.freezes = false
        configuration.stagingBytesMax = LiveSelfTest.bytes
        configuration.drainBufferCount = 16
        let group = try await LiveTapGroup(disks: [(name: "the scratch device", path: test.path)], pinDirectory: pins, configuration: configuration)
        defer { group.close() }
        await group.inject(faults, issues: issues, completions: completions)
        var figures = try await test.run(group)
        figures.kernel = withUnsafeBytes(of: &kernel.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        figures.milliseconds = Double(LiveReconciliation.now() - began) / 1e6
        return figures
    }
}

/// The scratch device and what is done to it.
final class LiveSelfTest: @unchecked Sendable {
    static let prefix = "afterimage-self-test-"
    static let turn = Atomic<Int>(0)
    static let bytes = 16 << 20
    let path: String
    private let fd: Int32
    private let image: UnsafeMutableRawPointer

    static func refuse(_ reason: String) -> SystemError { SystemError(errno: EOPNOTSUPP, what: "the live tap cannot be trusted on this machine: \(reason)") }

    init() throws(SystemError) {
        var number: Int32 = 0, fd: Int32 = -1
        let result = clivetap_loop_create(UInt64(Self.bytes), &number, &fd)
        guard result == 0 else {
            let why = switch -result {
            case ENOENT, ENXIO, ENODEV: "it cannot be tried, because this kernel has no loop driver or no device file for it (modprobe loop)"
            case EACCES, EPERM: "it cannot be tried without loop devices: \(SystemError.text(of: -result)) (run as root)"
            default: "it cannot be tried without a loop device: \(SystemError.text(of: -result))"
            }
            throw Self.refuse(why)
        }
        path = "/dev/loop\(number)"
        self.fd = fd
        image = .allocate(byteCount: Self.bytes, alignment: blockBytes)
        memset(image, 0, Self.bytes)                               // as the device is
    }

    deinit {
        close(fd)
        image.deallocate()
    }

    /// Of processes that were killed in the middle of one.
    static func removeStale(_ bpffs: String) {
        for name in directoryEntries(bpffs) where name.hasPrefix(prefix) {
            let pid = name.dropFirst(prefix.count).split(separator: "-").first.flatMap { Int32($0) } ?? 0
            if pid > 0, kill(pid, 0) < 0, errno == ESRCH { LiveTapGroup.detach(pinDirectory: bpffs + "/" + name) }
        }
    }

    func run(_ group: LiveTapGroup) async throws -> LiveTapSelfTest {
        let (stream, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
        var signal = stream.makeAsyncIterator()
        group.setWakeup { continuation.yield() }
        defer { group.setWakeup(nil) }
        var figures = LiveTapSelfTest()
        let writers = Writers(self)
        try writers.start()
        while !writers.areDone { _ = try await carry(group, &signal, &figures) }
        if let words = writers.failure { throw Self.refuse(words) }
        // Nothing is written any more: now it must be proven.
        var isProven = false
        for _ in 0..<20 where !isProven { isProven = try await carry(group, &signal, &figures) }
        let live = await group.liveStatistics
        if live.resyncCount > 0 { throw Self.refuse("it missed writes: \(live.resyncReason ?? "")") }
        guard isProven else { throw Self.refuse("what it saw and the kernel's account of the disk did not agree in 20 attempts") }
        try compare()
        figures.writeCount = writers.writeCount
        figures.discardCount = writers.discardCount
        figures.issuedCount = live.issuedCount
        figures.completedCount = live.completedCount
        figures.unseenCompletionCount = live.unseenCompletionCount
        figures.recursionMissCount = await group.recursionMisses.values.reduce(0, +)
        return figures
    }

    /// An epoch to the image. Whether it was proven.
    private func carry(_ group: LiveTapGroup, _ signal: inout AsyncStream<Void>.Iterator, _ figures: inout LiveTapSelfTest) async throws -> Bool {
        let cut = try await group.cut(fuzzyBytesMax: .max)
        figures.cutCount += 1
        if cut.kind == .exact { figures.provenCount += 1 }
        while true {
            guard let item = group.nextItem() else {
                _ = await signal.next()
                continue
            }
            switch item {
            case .data(_, let buffer):
                (image + Int(buffer.offsetBytes)).copyMemory(from: buffer.memory, byteCount: buffer.lengthBytes)
                group.release(buffer)
            case .zero(_, _, let offset, let length): memset(image + Int(offset), 0, Int(length))
            case .end(let epoch):
                group.acknowledge(epoch)
                return cut.kind == .exact
            case .abandoned(_, let reason): throw Self.refuse("the scratch device could not be read (\(reason.rawValue))")
            }
        }
    }

    /// Block by block: a block that differs is one whose write was never marked.
    private func compare() throws(SystemError) {
        let chunk = 1 << 20
        let memory = UnsafeMutableRawPointer.allocate(byteCount: chunk, alignment: blockBytes)
        defer { memory.deallocate() }
        var missed = 0
        for offset in stride(from: 0, to: Self.bytes, by: chunk) {
            guard pread(fd, memory, chunk, off_t(offset)) == chunk else { throw Self.refuse("the scratch device could not be read: \(SystemError.text(of: errno))") }
            for block in stride(from: 0, to: chunk, by: blockBytes) where memcmp(memory + block, image + offset + block, blockBytes) != 0 { missed += 1 }
        }
        if missed > 0 { throw Self.refuse("of \(Self.bytes / blockBytes) blocks written on a scratch device, the last writes to \(missed) were not seen") }
    }

    /// Threads of their own, because they block: each writes random blocks of its part, discards some of it, and writes a few again.
    private final class Writers: @unchecked Sendable {
        /// Its descriptor must stay open until the last thread has ended, whoever gave up on them.
        private let test: LiveSelfTest
        private let left: Atomic<Int>
        private let failed = Mutex<String?>(nil)
        private let writes = Atomic<UInt64>(0)
        private let discards = Atomic<UInt64>(0)
        private static let count = 4
        private static let rounds = 6
        private static let writesPerRound = 250

        init(_ test: LiveSelfTest) {
            self.test = test
            left = Atomic(Self.count)
        }

        var areDone: Bool { left.load(ordering: .acquiring) == 0 }
        var failure: String? { failed.withLock { $0 } }
        var writeCount: UInt64 { writes.load(ordering: .relaxed) }
        var discardCount: UInt64 { discards.load(ordering: .relaxed) }

        func start() throws(SystemError) {
            for number in 0..<Self.count {
                let start = Unmanaged.passRetained(Start(self, number))
                var thread = pthread_t()
                let result = pthread_create(
                    &thread, nil,
                    { argument in
                        let start = Unmanaged<Start>.fromOpaque(argument!).takeRetainedValue()
                        start.writers.run(start.number)
                        start.writers.left.subtract(1, ordering: .releasing)
                        return nil
                    }, start.toOpaque())
                guard result == 0 else {
                    start.release()
                    left.subtract(Self.count - number, ordering: .releasing)
                    throw SystemError(errno: result, doing: "start a thread for the live tap's self-test")
                }
                pthread_detach(thread)
            }
        }

        private final class Start: Sendable {
            let writers: Writers
            let number: Int
            init(_ writers: Writers, _ number: Int) {
                self.writers = writers
                self.number = number
            }
        }

        private func run(_ number: Int) {
            let fd = test.fd
            let part = LiveSelfTest.bytes / Self.count, blocks = part / blockBytes
            let memory = UnsafeMutableRawPointer.allocate(byteCount: blockBytes, alignment: blockBytes)
            defer { memory.deallocate() }
            var state = UInt64(number + 1) &* 0x9E37_79B9_7F4A_7C15
            func random(_ bound: Int) -> Int {
                state ^= state << 13
                state ^= state >> 7
                state ^= state << 17
                return Int(state % UInt64(bound))
            }
            for round in 0..<Self.rounds {
                for _ in 0..<Self.writesPerRound {
                    for word in 0..<blockBytes / 8 { memory.storeBytes(of: state &+ UInt64(word), toByteOffset: word * 8, as: UInt64.self) }
                    guard pwrite(fd, memory, blockBytes, off_t(number * part + random(blocks) * blockBytes)) == blockBytes else {
                        return failed.withLock { $0 = "the scratch device could not be written: \(SystemError.text(of: errno))" }
                    }
                    writes.add(1, ordering: .relaxed)
                }
                if round % 2 == 0, clivetap_discard(fd, UInt64(number * part + random(blocks / 2) * blockBytes), UInt64(part / 4)) == 0 {
                    discards.add(1, ordering: .relaxed)
                }
            }
        }
    }
}
