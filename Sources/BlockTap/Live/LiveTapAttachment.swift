import CLiveTap
import Glibc

/// The kernel's half of the live tap for one consistency group: attached to the block layer's tracepoints, with its maps and links pinned in
/// `directory` (on a bpffs), where it goes on working without a process and is found again by the next one.
///
/// Order of creation: maps, disks, links (issue before completion), and last `state.magic`: a directory without it was left by a process
/// that did not get that far, and is removed.
final class LiveTapAttachment {
    let directory: String
    let maps: LiveTapMaps
    /// Whether an earlier process attached it, so that nothing was missed since.
    let wasAdopted: Bool
    private let links: [Int32]
    /// The directory, locked: one process at a time.
    private let lock: Int32

    private static let mapNames = ["state", "disks", "slots", "summary", "chunks"]
    private static let programs = (0..<Int(CLIVETAP_COPIES)).map { "issue_\($0)" } + ["requeue", "complete"]
    /// Bitmaps of disks larger than this together are made when they are first needed.
    private static let eagerChunksMax = 32

    /// Whether this build has the program (tools/lib/bpf.sh).
    static var isAvailable: Bool { clivetap_program_bytes > 0 }

    /// Adopts what is pinned in `directory` if it is of this ABI and for exactly these disks, otherwise attaches afresh, or throws.
    init(directory: String, disks: [LiveDisk], mayAttach: Bool = true) throws(SystemError) {
        guard Self.isAvailable else {
            throw SystemError(errno: ENOSYS, what: "this build has no live tap: its BPF program was not compiled (run tools/lib/bpf.sh, then build again)")
        }
        guard disks.count <= Int(CLIVETAP_DISKS_MAX) else { throw SystemError(errno: E2BIG, what: "a live tap follows at most \(CLIVETAP_DISKS_MAX) disks") }
        let lock = try Self.locked(directory, mayMake: mayAttach)
        do throws(SystemError) {
            let adopted = try Self.adopt(directory, disks)
            if adopted == nil, !mayAttach { throw SystemError(errno: ENOENT, what: "nothing in \(directory) follows exactly these disks") }
            (maps, links) = if let adopted { adopted } else { try Self.attach(directory, disks) }
            wasAdopted = adopted != nil
        } catch {
            close(lock)
            throw error
        }
        self.directory = directory
        self.lock = lock
    }

    private static func attach(_ directory: String, _ disks: [LiveDisk]) throws(SystemError) -> (LiveTapMaps, [Int32]) {
        empty(directory)
        do throws(SystemError) {
            return (try create(directory, disks), openLinks(directory))
        } catch {
            empty(directory)
            throw error
        }
    }

    deinit {
        for link in links { close(link) }
        close(lock)
    }

    private static func locked(_ directory: String, mayMake: Bool) throws(SystemError) -> Int32 {
        guard !mayMake || mkdir(directory, 0o700) == 0 || errno == EEXIST else { throw SystemError(errno: errno, doing: "make \(directory) (is its parent a bpffs?)") }
        let fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard fd >= 0 else { throw SystemError(errno: errno, doing: "open \(directory)") }
        if lockFile(fd) == 0 { return fd }
        close(fd)
        throw SystemError(errno: EAGAIN, what: "cannot use \(directory): another process has this live tap (is a second agent running?)")
    }

    /// Detaches and forgets. What is pinned by nobody and open nowhere is gone.
    static func remove(directory: String) {
        empty(directory)
        rmdir(directory)
    }

    private static func empty(_ directory: String) {
        for name in directoryEntries(directory) { unlink(directory + "/" + name) }
    }

    /// How often the kernel skipped a program that would have interrupted itself, per program.
    var recursionMisses: [String: UInt64] {
        var misses: [String: UInt64] = [:]
        for (name, link) in zip(Self.programs, links) where link >= 0 {
            var count: UInt64 = 0
            if clivetap_recursion_misses(link, &count) == 0 { misses[name] = count }
        }
        return misses
    }

    // MARK: Adopt

    private static func adopt(_ directory: String, _ disks: [LiveDisk]) throws(SystemError) -> (LiveTapMaps, [Int32])? {
        var fds: [String: Int32] = [:]
        defer { for (name, fd) in fds where name != "chunks" { close(fd) } }
        for name in mapNames {
            let fd = clivetap_get("\(directory)/map-\(name)")
            guard fd >= 0 else { return nil }
            fds[name] = fd
        }
        guard try LiveTapMaps.areOurs(state: fds["state"]!, disks: fds["disks"]!, slots: fds["slots"]!, summary: fds["summary"]!) else {
            close(fds["chunks"]!)
            return nil
        }
        let links = openLinks(directory)
        guard !links.contains(where: { $0 < 0 }) else {
            for link in links where link >= 0 { close(link) }
            close(fds["chunks"]!)
            return nil
        }
        let maps = try LiveTapMaps(state: fds["state"]!, disks: fds["disks"]!, slots: fds["slots"]!, summary: fds["summary"]!, chunks: fds["chunks"]!)
        let state = maps.state.pointee
        guard state.magic == CLIVETAP_MAGIC, state.abi == UInt32(CLIVETAP_ABI), Int(state.disk_count) == disks.count,
            disks.indices.allSatisfy({ index in
                let known = maps.disks[index], disk = disks[index]
                return known.device == disk.kernelNumber && known.block_count == disk.blockCount && Int(known.queue_count) == disk.queueCount
                    && Int(known.tag_count) == disk.tagCount && known.disk_sequence == disk.sequence && known.beyond == 0 && known.unslotted == 0
            })
        else {
            for link in links { close(link) }
            return nil
        }
        try maps.adoptChunks()
        return (maps, links)
    }

    private static func openLinks(_ directory: String) -> [Int32] { programs.map { clivetap_get("\(directory)/link-\($0)") } }

    // MARK: Create

    /// libbpf has one logger for the whole process.
    private static let logTurn: Semaphore = {
        let semaphore = Semaphore()
        semaphore.signal()
        return semaphore
    }()

    private static func create(_ directory: String, _ disks: [LiveDisk]) throws(SystemError) -> LiveTapMaps {
        logTurn.wait()
        defer { logTurn.signal() }
        return try load(directory, disks)
    }

    private static func load(_ directory: String, _ disks: [LiveDisk]) throws(SystemError) -> LiveTapMaps {
        let log = UnsafeMutablePointer<CChar>.allocate(capacity: 65536)
        log.initialize(repeating: 0, count: 65536)
        clivetap_set_log(log, 65536)
        defer {
            clivetap_set_log(nil, 0)
            log.deallocate()
        }
        func check(_ result: Int32, _ what: String) throws(SystemError) {
            guard result < 0 else { return }
            let words = String(cString: log).split(separator: "\n").suffix(4).joined(separator: "; ")
            let advice = -result == EPERM || -result == EACCES ? " (run as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN)" : ""
            throw SystemError(errno: -result, what: "cannot \(what): \(SystemError.text(of: -result))\(advice)" + (words.isEmpty ? "" : " [\(words)]"))
        }
        var pointer: OpaquePointer?
        try check(clivetap_open(&pointer), "open the live tap's program")
        let tap = pointer!
        defer { clivetap_close(tap) }

        var chunkCount = 0
        var slotCount = 0
        for disk in disks {
            chunkCount += LiveTapMaps.chunkCount(blocks: disk.blockCount)
            slotCount += disk.queueCount * disk.tagCount
        }
        let summaryWords = chunkCount * LiveTapMaps.chunkSummaryWords
        try check(clivetap_set_entries(tap, "slots", UInt32(slotCount)), "size the live tap's maps")
        try check(clivetap_set_entries(tap, "summary", UInt32(summaryWords * 4)), "size the live tap's maps")
        try check(clivetap_set_entries(tap, "chunks", UInt32(chunkCount * 3)), "size the live tap's maps")
        try check(clivetap_load(tap), "load the live tap's program into the kernel")

        let chunks = dup(clivetap_map(tap, "chunks"))
        let maps = try LiveTapMaps(
            state: clivetap_map(tap, "state"), disks: clivetap_map(tap, "disks"), slots: clivetap_map(tap, "slots"),
            summary: clivetap_map(tap, "summary"), chunks: chunks)
        maps.state.pointee.abi = UInt32(CLIVETAP_ABI)
        maps.state.pointee.disk_count = UInt32(disks.count)
        maps.state.pointee.summary_words = UInt64(summaryWords)
        var chunkBase = 0
        var slotBase = 0
        for (index, disk) in disks.enumerated() {
            maps.disks[index].chunk_base = UInt32(chunkBase)
            maps.disks[index].chunk_count = UInt32(LiveTapMaps.chunkCount(blocks: disk.blockCount))
            maps.disks[index].slot_base = UInt32(slotBase)
            maps.disks[index].queue_count = UInt32(disk.queueCount)
            maps.disks[index].tag_count = UInt32(disk.tagCount)
            maps.disks[index].block_count = disk.blockCount
            maps.disks[index].disk_sequence = disk.sequence
            chunkBase += LiveTapMaps.chunkCount(blocks: disk.blockCount)
            slotBase += disk.queueCount * disk.tagCount
        }
        if chunkCount <= eagerChunksMax {
            for chunk in 0..<chunkCount { try maps.ensureChunk(chunk) }
        }
        for name in mapNames { try check(clivetap_pin(clivetap_map(tap, name), "\(directory)/map-\(name)"), "pin a map in \(directory)") }
        for (index, disk) in disks.enumerated() { maps.disks[index].device = disk.kernelNumber }
        for program in programs { try check(clivetap_attach(tap, program, "\(directory)/link-\(program)"), "attach the live tap to the block layer") }
        maps.state.pointee.magic = CLIVETAP_MAGIC
        return maps
    }
}
