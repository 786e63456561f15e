import Foundation
import GRDB
import Replica

/// What the store does by itself, and what of it people are told.
extension Lifecycle {
    /// Once, after `resume`: retention, merging, giving space back.
    func startUpkeep(_ upkeep: UpkeepConfiguration) async throws {
        for record in try await catalogue.read({ db in try ServerRecord.fetchAll(db) }) { giveRetention(record) }
        store.setTightening(upkeep.tightensWhenLow)
        store.onSpaceChange = { [weak self] _ in
            guard let self else { return }
            Task { await self.spaceChanged() }
        }
        store.startUpkeep(everySeconds: upkeep.everySeconds, bytesPerSecond: upkeep.bytesPerSecond)
        await spaceChanged()
    }

    /// Asks the store, since calls may overtake each other on their way here.
    func spaceChanged() async {
        let now = store.spaceState
        guard now != toldSpace, !isStopping else { return }
        let before = toldSpace
        toldSpace = now
        let figures = store.statistics()
        let detail = "\(figures.freeBytes >> 20) of \(figures.capacityBytes >> 20) MiB free"
        do {
            try await catalogue.write { db in
                try db.event("appliance", "Store space", before: before.rawValue, after: now.rawValue, detail: detail)
            }
        } catch {
            logger.error("cannot store that the store's space is \(now.rawValue): \(error)")
        }
    }

    func storeView() -> StoreView {
        let figures = store.statistics()
        return StoreView(
            directory: settings.storeDirectory, space: store.spaceState, freeBytes: figures.freeBytes, capacityBytes: figures.capacityBytes,
            storedBytes: figures.storedBytes, layerCount: figures.layerCount, badBlockCount: figures.badBlockCount,
            reclaimedBytes: figures.upkeep.bytesReclaimed, expiredPointCount: figures.upkeep.pointsExpired)
    }

    /// Lines that somebody ought to read, worst first.
    func alerts() -> [Alert] {
        var alerts: [Alert] = []
        let store = storeView()
        let room = "\(store.freeBytes >> 20) of \(store.capacityBytes >> 20) MiB are free"
        switch store.space {
        case .ok: break
        case .low:
            alerts.append(Alert(kind: .storeLow, text: "the store is nearly full (\(room) in \(store.directory)): give it more room, keep fewer recovery points (afterimage server set-policy), or release held ones"))
        case .full:
            alerts.append(Alert(kind: .storeFull, text: "the store is FULL (\(room) in \(store.directory)): nothing is taken in, and no new recovery points are made; the sources keep what they have not sent"))
        }
        if store.badBlockCount > 0 {
            alerts.append(Alert(kind: .badBlocks, text: "\(store.badBlockCount) damaged blocks were found since the appliance was started; its log names them (afterimage store check \(store.directory) looks at everything)"))
        }
        return alerts
    }
}
