import BlockTap

/// What people say about recovery points, and dropping them.
extension ReplicaStore {
    /// Which recovery points of a group upkeep keeps; nil, as after opening: all. In memory: whoever opens the store says it again.
    /// A policy that is not valid keeps all.
    public func setRetention(_ group: GroupID, _ policy: RecoveryPointPolicy?) {
        var policy = policy
        do throws(StoreError) { try policy?.validated() } catch {
            logger.error("a policy that makes no sense keeps all recovery points", metadata: ["group": "\(group)", "error": "\(error)"])
            policy = nil
        }
        upkeep.settings.withLock { $0.policies[group] = policy }
        upkeep.wake()
    }

    /// Forgets recovery points: all of `ids` or, when one of them is held or unknown, none. What forks and open readers read stays until
    /// they go; the space of the rest comes back through upkeep.
    public func dropRecoveryPoints(_ group: GroupID, _ ids: [RecoveryPointID]) throws(StoreError) {
        try thread.perform { () throws(StoreError) in
            if ids.isEmpty { return }
            for id in ids {
                let point = try self.point(group, id)
                guard let hold = point.hold else { continue }
                if self.options.deliberateFault == .holdsIgnored {
                    try self.change(.pointMarked(group, id, PointMarks(note: point.note, hold: nil, isOnDemand: point.isOnDemand)))
                } else {
                    throw .invalid("recovery point \(id) of group \(group) is held as \"\(hold)\": release it first")
                }
            }
            var seen: Set<RecoveryPointID> = []
            try self.change(.pointsDropped(group, ids.filter { seen.insert($0).inserted }))
            self.upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
        }
        upkeep.wake()
    }

    /// Sets the note, and whether somebody asked for the point: such a one stays as long as the longest tier of the policy.
    public func markRecoveryPoint(_ group: GroupID, _ id: RecoveryPointID, note: String?, isOnDemand: Bool) throws(StoreError) {
        if let note { try checkText(note, "a note") }
        try mark(group, id) { (marks) throws(StoreError) in
            marks.note = note
            marks.isOnDemand = isOnDemand
        }
    }

    /// Holds a point under a name: it never expires and is not dropped, nor is its group, before it is released. Throws `.invalid` when it
    /// is held under another name.
    public func holdRecoveryPoint(_ group: GroupID, _ id: RecoveryPointID, name: String) throws(StoreError) {
        guard !name.isEmpty else { throw .invalid("a held recovery point needs a name") }
        try checkText(name, "the name of a held recovery point")
        try mark(group, id) { (marks) throws(StoreError) in
            if let hold = marks.hold, hold != name { throw .invalid("recovery point \(id) of group \(group) is held as \"\(hold)\" already") }
            marks.hold = name
        }
    }

    /// Makes a held point one like others. Nothing happens when it is not held.
    public func releaseRecoveryPoint(_ group: GroupID, _ id: RecoveryPointID) throws(StoreError) {
        try mark(group, id) { (marks) throws(StoreError) in marks.hold = nil }
    }

    private func mark(_ group: GroupID, _ id: RecoveryPointID, _ change: @escaping (inout PointMarks) throws(StoreError) -> Void) throws(StoreError) {
        try thread.perform { () throws(StoreError) in
            let point = try self.point(group, id)
            let before = PointMarks(note: point.note, hold: point.hold, isOnDemand: point.isOnDemand)
            var after = before
            try change(&after)
            if after != before { try self.change(.pointMarked(group, id, after)) }
        }
    }

    private func point(_ group: GroupID, _ id: RecoveryPointID) throws(StoreError) -> RecoveryPoint {
        guard let record = read({ $0.groups[group] }) else { throw .unknownGroup(group) }
        guard let point = record.points.last(where: { $0.point.id == id })?.point else { throw .unknownRecoveryPoint(group, id) }
        return point
    }

    private func checkText(_ text: String, _ what: String) throws(StoreError) {
        guard text.utf8.count <= 1024, !text.unicodeScalars.contains(where: { $0.value < 0x20 || $0.value == 0x7F }) else {
            throw .invalid("\(what) has at most 1024 bytes and no control characters")
        }
    }
}
