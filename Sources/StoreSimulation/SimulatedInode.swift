import Glibc

@testable import Replica

// What a simulated file system consists of: what it shows, what is durable, and what a loss of power makes of the rest.

enum SimulatedEntry {
    case file(SimulatedInode)
    case directory(SimulatedDirectory)
}

final class SimulatedDirectory {
    var live: [String: SimulatedEntry] = [:]
    private var durable: [String: SimulatedEntry] = [:]
    private var pending: [[(name: String, entry: SimulatedEntry?)]] = []

    func set(_ change: [(name: String, entry: SimulatedEntry?)]) {
        for (name, entry) in change { live[name] = entry }
        pending.append(change)
    }

    func sync() {
        durable = live
        pending = []
    }

    func losePower(_ chance: Int, _ random: inout SimulationRandom) {
        var lost: Set<String> = []
        for change in pending {
            if random.below(8) < chance, !change.contains(where: { lost.contains($0.name) }) {
                for (name, entry) in change { durable[name] = entry }
            } else {
                for (name, _) in change { lost.insert(name) }
            }
        }
        pending = []
        live = durable
        for name in live.keys.sorted() {
            switch live[name]! {
            case .file(let inode): inode.losePower(chance, &random)
            case .directory(let inner): inner.losePower(chance, &random)
            }
        }
    }
}

/// What a file holds, and which of its pages occupy space.
struct SimulatedContent {
    var bytes: [UInt8] = []
    private(set) var pages: [Bool] = []
    private(set) var pageCount = 0

    mutating func put(_ source: UnsafeRawBufferPointer, at offset: Int) {
        if source.isEmpty { return }
        if bytes.count < offset + source.count { resize(offset + source.count) }
        bytes.withUnsafeMutableBytes { memcpyBytes($0.baseAddress! + offset, source.baseAddress!, source.count) }
        occupy(pagesTouched(offset, source.count))
    }

    mutating func resize(_ count: Int) {
        if count <= bytes.count { bytes.removeLast(bytes.count - count) } else { bytes.append(contentsOf: repeatElement(0, count: count - bytes.count)) }
        let wanted = (count + SimulatedStorage.pageBytes - 1) / SimulatedStorage.pageBytes
        while pages.count > wanted { if pages.removeLast() { pageCount -= 1 } }
        if pages.count < wanted { pages.append(contentsOf: repeatElement(false, count: wanted - pages.count)) }
    }

    mutating func occupy(_ range: Range<Int>) {
        for page in range where !pages[page] {
            pages[page] = true
            pageCount += 1
        }
    }

    mutating func punch(_ range: Range<Int>) {
        for page in range.clamped(to: 0..<pages.count) where pages[page] {
            pages[page] = false
            pageCount -= 1
            let end = min(bytes.count, (page + 1) * SimulatedStorage.pageBytes)
            for index in page * SimulatedStorage.pageBytes..<end { bytes[index] = 0 }
        }
    }

    /// Pages of which a write needs space.
    func missing(_ offset: Int, _ count: Int) -> Int {
        pagesTouched(offset, count).reduce(0) { $0 + ($1 < pages.count && pages[$1] ? 0 : 1) }
    }
}

func pagesTouched(_ offset: Int, _ count: Int) -> Range<Int> {
    count == 0 ? 0..<0 : offset / SimulatedStorage.pageBytes..<(offset + count - 1) / SimulatedStorage.pageBytes + 1
}

final class SimulatedInode {
    private enum Change {
        case write(Int, [UInt8])
        case resize(Int)
        case occupy(Range<Int>)
        case punch(Range<Int>)
    }

    /// What the system shows.
    private(set) var live = SimulatedContent()
    private var durable = SimulatedContent()
    private var pending: [Change] = []
    /// Pages that a failed sync left clean in the cache and unwritten on the disk.
    private var lostPages: Set<Int> = []
    /// Counts its pages while a name leads to it.
    private weak var space: SimulatedStorage?

    var pageCount: Int { live.pageCount }

    func link(to storage: SimulatedStorage) {
        space = storage
        storage.use(live.pageCount)
    }

    func unlink() {
        space?.use(-live.pageCount)
        space = nil
    }

    private func change(_ body: (inout SimulatedContent) -> Void) {
        let before = live.pageCount
        body(&live)
        if live.pageCount != before { space?.use(live.pageCount - before) }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) {
        if bytes.isEmpty { return }
        change { $0.put(bytes, at: offset) }
        // A page is dirty as a whole: writing to it brings back what a failed sync lost there.
        let page = SimulatedStorage.pageBytes
        for lost in lostPages.sorted() where lost * page < offset + bytes.count && offset < (lost + 1) * page {
            lostPages.remove(lost)
            if lost * page < live.bytes.count { pending.append(.write(lost * page, Array(live.bytes[lost * page..<min(live.bytes.count, (lost + 1) * page)]))) }
        }
        pending.append(.write(offset, Array(bytes)))
    }

    func resize(_ count: Int) {
        change { $0.resize(count) }
        pending.append(.resize(count))
    }

    func occupy(_ pages: Range<Int>) {
        change { $0.occupy(pages) }
        pending.append(.occupy(pages))
    }

    func punch(_ pages: Range<Int>) {
        change { $0.punch(pages) }
        lostPages.subtract(pages)
        pending.append(.punch(pages))
    }

    func missing(_ offset: Int, _ count: Int) -> Int { live.missing(offset, count) }

    /// A bit flips on the disk, where nothing is about to be written. Returns its number.
    func flip(_ random: inout SimulationRandom) -> Int? {
        let pages = live.pages.indices.filter { live.pages[$0] }
        guard !pages.isEmpty else { return nil }
        let start = pages[random.below(pages.count)] * SimulatedStorage.pageBytes
        var byte = start
        // Rather where something is than in what fills a page.
        for _ in 0..<8 {
            byte = start + random.below(min(SimulatedStorage.pageBytes, live.bytes.count - start))
            if live.bytes[byte] != 0 { break }
        }
        let bit = random.below(8)
        live.bytes[byte] ^= 1 << bit
        if byte < durable.bytes.count { durable.bytes[byte] = live.bytes[byte] }
        return byte * 8 + bit
    }

    func sync() {
        for change in pending { apply(change) }
        pending = []
    }

    func failSync(isDirect: Bool, _ random: inout SimulationRandom) {
        if isDirect { return }
        let page = SimulatedStorage.pageBytes
        for change in pending {
            guard case .write(let offset, let bytes) = change else {
                apply(change)
                continue
            }
            for number in offset / page...(offset + bytes.count - 1) / page {
                if lostPages.contains(number) || random.oneIn(2) {
                    lostPages.insert(number)
                } else {
                    let start = max(offset, number * page)
                    let end = min(offset + bytes.count, (number + 1) * page)
                    apply(.write(start, Array(bytes[start - offset..<end - offset])))
                }
            }
        }
        pending = []
    }

    func losePower(_ chance: Int, _ random: inout SimulationRandom) {
        let sector = SimulatedStorage.sectorBytes
        let page = SimulatedStorage.pageBytes
        // A sector is as it was at some moment: what came later is lost with what came earlier.
        var lost: Set<Int> = []
        for change in pending {
            switch change {
            case .resize, .occupy: if random.below(8) < chance { apply(change) }
            case .punch(let pages):
                for number in pages {
                    let sectors = number * page / sector..<(number + 1) * page / sector
                    if random.below(8) < chance, lost.isDisjoint(with: sectors) { apply(.punch(number..<number + 1)) } else { lost.formUnion(sectors) }
                }
            case .write(let offset, let bytes):
                var start = offset
                while start < offset + bytes.count {
                    let end = min((start / sector + 1) * sector, offset + bytes.count)
                    if random.below(8) < chance, !lost.contains(start / sector) {
                        apply(.write(start, Array(bytes[start - offset..<end - offset])))
                    } else {
                        lost.insert(start / sector)
                    }
                    start = end
                }
            }
        }
        pending = []
        lostPages = []
        live = durable
    }

    private func apply(_ change: Change) {
        switch change {
        case .write(let offset, let bytes): bytes.withUnsafeBytes { durable.put($0, at: offset) }
        case .resize(let count): durable.resize(count)
        case .occupy(let pages):
            if durable.pages.count < pages.upperBound { durable.resize(pages.upperBound * SimulatedStorage.pageBytes) }
            durable.occupy(pages)
        case .punch(let pages): durable.punch(pages)
        }
    }
}
