import Foundation
import GRDB
import Replica

/// Damage that scrubbing finds: told in the audit log, kept at hand for `status` and for whoever chooses a recovery point.
///
/// Findings come from a thread of the store, hundreds at once when a disk dies. They are gathered for a moment and written as one line
/// per disk and kind.
struct DamageBook: Sendable {
    /// As of the last findings. Points may have expired since.
    var extents: [BadExtent] = []
    /// Layers that cannot be opened at all, by path.
    var files: [String: BadFile] = [:]
    /// What the source no longer had when it was asked, in this pass.
    var lost: [GroupID: [String: Set<UInt64>]] = [:]
    var lastPassEnd: Date?
    /// Reads that met damage, as counted at the ends of the last two passes: what was counted before a whole pass was looked at by it.
    var hitsAtEnd: UInt64 = 0
    var hitsLookedAt: UInt64 = 0
    /// Scrubbed bytes at the end of the last pass: one that read nothing is not worth a line.
    var readBytesAtEnd: UInt64 = 0

    struct BadFile: Sendable, Hashable {
        var what: String
        var group: GroupID
        var recoveryPoints: [RecoveryPointID]
    }

    var isEmpty: Bool { extents.isEmpty && files.isEmpty }

    /// Blocks that are damaged at each of the group's points; a point that cannot be opened at all has none that are sound.
    func damage(of group: GroupID) -> (blocks: [RecoveryPointID: UInt64], unopenable: Set<RecoveryPointID>) {
        var blocks: [RecoveryPointID: UInt64] = [:]
        for extent in extents where extent.group == group {
            for point in extent.recoveryPoints { blocks[point, default: 0] += extent.count }
        }
        return (blocks, Set(files.values.filter { $0.group == group }.flatMap(\.recoveryPoints)))
    }
}

extension Lifecycle {
    private static let gatherMilliseconds = 300

    func startScrub(_ configuration: ScrubConfiguration) async throws {
        guard configuration.bytesPerSecond > 0 else { return }
        damage.lastPassEnd = try await catalogue.read { db in
            try EventRecord.filter(Column("what") == Self.scrubbed).order(Column("id").desc).fetchOne(db)?.time
        }
        let (findings, continuation) = AsyncStream.makeStream(of: ScrubFinding.self)
        store.startScrub(bytesPerSecond: configuration.bytesPerSecond, pauseSeconds: configuration.pauseSeconds) { continuation.yield($0) }
        scrubTask = Task { [weak self] in
            for await finding in findings {
                guard let self else { return }
                await self.gather(finding)
            }
        }
    }

    /// The first finding of a batch has it written after a moment.
    private func gather(_ finding: ScrubFinding) {
        findings.append(finding)
        guard findings.count == 1 else { return }
        Task { [weak self] in
            try? await Task.sleep(for: .milliseconds(Self.gatherMilliseconds))
            await self?.tellFindings()
        }
    }

    /// Writes what was gathered, and looks at what the store knows now.
    func tellFindings() async {
        let batch = findings
        findings = []
        guard !batch.isEmpty, !isStopping else { return }
        let lines = DamageWords.lines(batch)
        for finding in batch { note(finding) }
        let figures = store.statistics().scrub
        do {
            damage.extents = figures.badBlockCount == 0 ? [] : try await onThread("damage") { [store] _ in store.badExtents() }
        } catch {
            logger.error("cannot list what is damaged: \(error)")
        }
        if figures.badFileCount == 0 { damage.files = [:] }
        do {
            let ended = passEnded(batch)
            try await catalogue.write { db in
                for line in lines {
                    let server = try line.group.flatMap { try ServerRecord.fetchOne(db, key: $0.rawValue) }
                    try db.event("appliance", line.what, server: server, detail: line.detail)
                }
                if let ended { try db.event("appliance", Self.scrubbed, detail: ended) }
            }
        } catch {
            logger.error("cannot store what scrubbing has found: \(error)")
        }
    }

    private func note(_ finding: ScrubFinding) {
        switch finding {
        case .bad: break
        case .badFile(let path, let what, let group, let points, _):
            damage.files[path] = .init(what: what, group: group, recoveryPoints: points)
        case .repaired(let group, let disk, let block, let count):
            damage.lost[group]?[disk]?.subtract(block..<(block + count))
        case .notRepaired(let group, let disk, let block, let count, _):
            damage.lost[group, default: [:]][disk, default: []].formUnion(block..<(block + count))
        case .passEnded:
            // Whatever is still damaged is asked for again.
            damage.lost = [:]
            damage.hitsLookedAt = damage.hitsAtEnd
            damage.hitsAtEnd = store.statistics().badBlockCount
        }
    }

    /// The line for the audit log when a pass ended that read something.
    private func passEnded(_ batch: [ScrubFinding]) -> String? {
        var last: ScrubStatistics?
        for case .passEnded(let figures) in batch { last = figures }
        guard let last else { return nil }
        let read = last.readBytes - min(last.readBytes, damage.readBytesAtEnd)
        damage.readBytesAtEnd = last.readBytes
        guard read > 0 else { return nil }
        damage.lastPassEnd = Date(nanoseconds: last.lastPassEndNanoseconds)
        return "\(Amount.bytes(read)) read; " + (damage.isEmpty ? "everything is as it was written" : "damage is known")
    }

    static let scrubbed = "Scrub ended"

    /// One per server that damage is known of.
    func damageAlerts() async -> [Alert] {
        let figures = store.statistics()
        var alerts: [Alert] = []
        if !damage.isEmpty {
            let names: [String: String]
            do {
                names = try await catalogue.read { db in Dictionary(uniqueKeysWithValues: try ServerRecord.fetchAll(db).map { ($0.id, $0.name) }) }
            } catch {
                names = [:]
            }
            let groups = Set(damage.extents.map(\.group) + damage.files.values.map(\.group))
            for group in groups.sorted(by: { $0.rawValue < $1.rawValue }) {
                let name = names[group.rawValue]
                alerts.append(Alert(kind: .badBlocks, subject: name ?? group.rawValue, text: words(group, name ?? "a group that no server has")))
            }
        } else if figures.badBlockCount > damage.hitsLookedAt {
            alerts.append(Alert(kind: .badBlocks, text: "reads met damaged blocks (\(figures.badBlockCount - damage.hitsLookedAt) times); the appliance's log names them, the next scrub says which recovery points they touch"))
        }
        return alerts
    }

    private func words(_ group: GroupID, _ name: String) -> String {
        let (blocks, unopenable) = damage.damage(of: group)
        let points = store.recoveryPoints(group)
        let touched = points.filter { blocks[$0.id] != nil || unopenable.contains($0.id) }
        let sound = points.last { blocks[$0.id] == nil && !unopenable.contains($0.id) }
        let own = damage.extents.filter { $0.group == group }
        let count = own.reduce(0) { $0 + $1.count }
        var text = "\(name): the store has lost "
        var what: [String] = []
        if count > 0 { what.append("\(count) \(count == 1 ? "block" : "blocks") of disk \(Set(own.map(\.disk)).sorted().joined(separator: ", "))") }
        let files = damage.files.values.count { $0.group == group }
        if files > 0 { what.append("\(files) \(files == 1 ? "layer" : "layers")") }
        text += what.joined(separator: " and ")
        if touched.isEmpty {
            text += "; no recovery point shows that"
        } else {
            text += "; \(touched.count) of \(points.count) recovery points are touched (\(DamageWords.list(touched.map(\.id))))"
            text += sound.map { "; the newest sound one is \($0.id)" } ?? "; none is sound"
        }
        let lost = damage.lost[group]?.values.reduce(0) { $0 + $1.count } ?? 0
        if lost > 0 {
            text += ". The source does not have \(lost == Int(count) ? "them" : "\(lost) of them") any more"
        } else if count > 0 {
            text += ". They are taken from the source while it replicates, if it still has the same there"
        }
        return text
    }

    func scrubView() -> ScrubView {
        let figures = store.statistics().scrub
        return ScrubView(
            passCount: figures.passCount, lastPassEnd: damage.lastPassEnd, readBytes: figures.readBytes, badBlockCount: figures.badBlockCount,
            badFileCount: figures.badFileCount, repairedBlockCount: figures.repairedBlockCount, isOn: scrubTask != nil)
    }

    func storeReport() -> StoreReport { StoreReport(store: storeView(), badExtents: damage.extents) }

    /// What is to be said before somebody builds on this point; nil when nothing is known against it.
    func damageWarning(_ point: RecoveryPointID, of group: GroupID) -> String? {
        let (blocks, unopenable) = damage.damage(of: group)
        if unopenable.contains(point) { return "warning: a layer of recovery point \(point) is damaged: what lies in it cannot be read" }
        guard let count = blocks[point] else { return nil }
        return "warning: \(count) damaged \(count == 1 ? "block" : "blocks") in recovery point \(point): reading them is an I/O error (afterimage status)"
    }
}

/// What scrubbing found, one line per server, disk and kind.
enum DamageWords {
    struct Line: Equatable {
        var what: String
        var group: GroupID?
        var detail: String
    }

    static func lines(_ findings: [ScrubFinding]) -> [Line] {
        struct Key: Hashable {
            var what: String
            var group: GroupID
            var disk: String
            var why: String
        }
        var order: [Key] = []
        var blocks: [Key: Set<UInt64>] = [:]
        var points: [Key: [RecoveryPointID]] = [:]
        var lines: [Line] = []
        func add(_ key: Key, _ block: UInt64, _ count: UInt64, _ touched: [RecoveryPointID] = []) {
            if blocks[key] == nil { order.append(key) }
            blocks[key, default: []].formUnion(block..<(block + count))
            for point in touched where points[key]?.contains(point) != true { points[key, default: []].append(point) }
        }
        for finding in findings {
            switch finding {
            case .bad(let extent):
                add(Key(what: "Damage found", group: extent.group, disk: extent.disk, why: ""), extent.block, extent.count, extent.recoveryPoints)
            case .badFile(let path, let what, let group, let touched, _):
                lines.append(Line(what: "Damage found", group: group, detail: "\(path): \(what); \(self.touched(touched))"))
            case .repaired(let group, let disk, let block, let count):
                add(Key(what: "Damage repaired", group: group, disk: disk, why: ""), block, count)
            case .notRepaired(let group, let disk, let block, let count, let why):
                add(Key(what: "Damage not repaired", group: group, disk: disk, why: why), block, count)
            case .passEnded: break
            }
        }
        for key in order {
            var detail = "disk \(key.disk), \(ranges(blocks[key] ?? []))"
            if key.what == "Damage found" { detail += "; " + touched(points[key] ?? []) }
            if !key.why.isEmpty { detail += ": \(key.why)" }
            lines.append(Line(what: key.what, group: key.group, detail: detail))
        }
        return lines
    }

    private static func touched(_ points: [RecoveryPointID]) -> String {
        points.isEmpty ? "no recovery point shows it" : "touches \(points.count) \(points.count == 1 ? "recovery point" : "recovery points"): \(list(points))"
    }

    /// The first and the last few.
    static func list(_ points: [RecoveryPointID]) -> String {
        let names = points.map(\.rawValue)
        return names.count <= 6 ? names.joined(separator: ", ") : (names.prefix(3) + ["…"] + names.suffix(2)).joined(separator: ", ")
    }

    /// `block 7`, `3 blocks: 7, 9 to 10`
    static func ranges(_ blocks: Set<UInt64>) -> String {
        var runs: [ClosedRange<UInt64>] = []
        for block in blocks.sorted() {
            if let last = runs.last, last.upperBound + 1 == block { runs[runs.count - 1] = last.lowerBound...block } else { runs.append(block...block) }
        }
        let words = runs.map { $0.count == 1 ? "\($0.lowerBound)" : "\($0.lowerBound) to \($0.upperBound)" }
        let shown = words.prefix(8).joined(separator: ", ") + (words.count > 8 ? ", …" : "")
        return blocks.count == 1 ? "block \(shown)" : "\(blocks.count) blocks: \(shown)"
    }
}
