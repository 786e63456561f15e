/// How much room the store's file system has. `low` comes before anything is refused, so that somebody can be told in time.
public enum SpaceState: String, Codable, Sendable, Hashable, CaseIterable {
    case ok
    /// Less is free than the low-water mark.
    case low
    /// Something was refused for lack of space, and there still is not as much as the mark.
    case full
}

extension ReplicaStore {
    public var spaceState: SpaceState { upkeep.settings.withLock { $0.space } }

    /// Called with each new `spaceState`, on a thread of the store: must not block, nor call the store.
    public var onSpaceChange: (@Sendable (SpaceState) -> Void)? {
        get { upkeep.settings.withLock { $0.onSpaceChange } }
        set { upkeep.settings.withLock { $0.onSpaceChange = newValue } }
    }

    /// Whether upkeep drops recovery points before their time while space is low and nothing else can be given back: one by one, the
    /// oldest first, so that the densest tier goes last; those that somebody asked for after all others. Never the newest, never held
    /// ones. Off at first.
    public func setTightening(_ on: Bool) {
        upkeep.settings.withLock { $0.isTightening = on }
        upkeep.wake()
    }

    /// The low-water mark: the larger of the two options, but at most a quarter of the file system.
    var lowSpaceMark: UInt64 {
        let capacity = storage.space().capacityBytes
        return min(max(options.lowSpaceBytes, capacity / 100 * options.lowSpacePercent), capacity / 4)
    }

    func lookAtSpace() {
        let (free, mark) = (storage.space().freeBytes, lowSpaceMark)
        setSpace { settings in
            // Somewhat more than the mark, so that it does not flutter around it.
            if free >= mark + mark / 8 || (settings.space == .ok && free >= mark) {
                settings.wasRefused = false
                return .ok
            }
            return settings.wasRefused ? .full : .low
        }
    }

    /// Something could not be written for lack of space.
    func spaceRefused() {
        setSpace { settings in
            settings.wasRefused = true
            return .full
        }
        upkeep.wake()
    }

    /// An epoch found space again.
    func spaceFound() {
        guard upkeep.settings.withLock({ $0.wasRefused }) else { return }
        upkeep.settings.withLock { $0.wasRefused = false }
        lookAtSpace()
    }

    private func setSpace(_ next: (inout Upkeep.Settings) -> SpaceState) {
        let (change, tell) = upkeep.settings.withLock { settings -> (SpaceState?, (@Sendable (SpaceState) -> Void)?) in
            let state = next(&settings)
            if state == settings.space { return (nil, nil) }
            settings.space = state
            return (state, settings.onSpaceChange)
        }
        guard let change else { return }
        if change == .ok {
            logger.notice("the store has space again", metadata: ["store": "\(storage.location)"])
        } else {
            logger.warning("the store's space is \(change.rawValue)", metadata: ["store": "\(storage.location)", "freeBytes": "\(storage.space().freeBytes)"])
        }
        tell?(change)
    }

    /// The last resort of a round.
    func tighten() throws(StoreError) -> UpkeepAction? {
        guard upkeep.settings.withLock({ $0.isTightening && $0.space != .ok }) else { return nil }
        var oldest: (group: GroupID, point: RecoveryPoint)?
        for group in groups() {
            for point in recoveryPoints(group.id).dropLast() where point.hold == nil {
                if let other = oldest?.point, (other.isOnDemand ? 1 : 0, other.receivedTimeNanoseconds) <= (point.isOnDemand ? 1 : 0, point.receivedTimeNanoseconds) { continue }
                oldest = (group.id, point)
            }
        }
        guard let (group, point) = oldest else { return nil }
        try dropRecoveryPoints(group, [point.id])
        logger.warning("dropped a recovery point before its time, since space is low", metadata: ["group": "\(group)", "recoveryPoint": "\(point.id)"])
        upkeep.count { $0.pointsExpired += 1 }
        return .expired(group, 1)
    }
}
