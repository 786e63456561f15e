import BlockTap

extension ReplicaStore {
    /// Seals an epoch with nothing in it on top of what the group is: gives it a position, and a recovery point when `cut` is exact. Blocks; not for
    /// the store's thread.
    public func sealNothing(_ group: GroupID, generation: Generation, cut: Cut, instance: String) throws(StoreError) -> RecoveryPoint? {
        try sealed(beginEpoch(group, generation: generation, cut: cut, instance: instance, after: self.group(group)?.lastDurable))
    }

    /// Seals an epoch and waits until it is durable, or is not.
    func sealed(_ writer: EpochWriter) throws(StoreError) -> RecoveryPoint? {
        let done = Semaphore()
        nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>?
        writer.seal(consistency: .crash) {
            result = $0
            done.signal()
        }
        done.wait()
        return try result!.get()
    }
}
