import Foundation
import GRDB
import Replica

/// What the store does by itself, and what of it people are told.
extension Lifecycle {
    /// Once, after `resume`: retention, merging, giving space back, scrubbing.
    func startUpkeep(_ upkeep: UpkeepConfiguration) async throws {
        for record in try await catalogue.read({ db in try ServerRecord.fetchAll(db) }) { giveRetention(record) }
        tightensWhenLow = upkeep.tightensWhenLow
        store.setTightening(upkeep.tightensWhenLow)
        store.onSpaceChange = { [weak self] _ in
            guard let self else { return }
            Task { await self.spaceChanged() }
        }
        store.startUpkeep(everySeconds: upkeep.everySeconds, bytesPerSecond: upkeep.bytesPerSecond)
        await spaceChanged()
        try await startScrub(upkeep.scrub)
    }

    /// Asks the store, since calls may overtake each other on their way here.
    func spaceChanged() async {
        let now = store.spaceState
        guard now != toldSpace, !isStopping else { return }
        let before = toldSpace
        toldSpace = now
        let figures = store.statistics()
        let detail = "\(Amount.bytes(figures.freeBytes)) of \(Amount.bytes(figures.capacityBytes)) free"
            + (now != .ok && tightensWhenLow ? "; recovery points go before their time when nothing else helps" : "")
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
            directory: settings.storeDirectory, storageClass: StorageClass.below(settings.storeDirectory)?.storageClass, space: store.spaceState, tightensWhenLow: tightensWhenLow, freeBytes: figures.freeBytes,
            capacityBytes: figures.capacityBytes, storedBytes: figures.storedBytes, layerCount: figures.layerCount, segmentCount: figures.segmentCount,
            forkCount: figures.forkCount, markCount: figures.markCount, badReadCount: figures.badBlockCount, upkeep: UpkeepView(figures.upkeep), scrub: scrubView())
    }
}
