/// Everything that the store refuses or cannot do. Each case says what failed and on what; `description` also what to do.
public enum StoreError: Error, Sendable, Equatable, CustomStringConvertible {
    /// No space on the store's file system. Nothing was published; what was half written has been given back.
    case full(what: String)
    /// The caller's generation is older than the group's.
    case fenced(GroupID, current: Generation)
    case unknownGroup(GroupID)
    case unknownRecoveryPoint(GroupID, RecoveryPointID)
    case unknownFork(ForkID)
    /// A disk became smaller; its old recovery points could not be told from new ones.
    case shrunk(volume: String, nowBytes: UInt64, wasBytes: UInt64)
    /// The caller broke the rules of the call (outside the volume, not aligned, conflicting definition).
    case invalid(String)
    /// Held by somebody else: a second process on the store, a second writer of a fork.
    case busy(String)
    case versionTooNew(path: String, found: UInt32, supported: UInt32)
    /// Written by a version before the first that was released in this form.
    case versionTooOld(path: String, found: UInt32, supported: UInt32)
    /// A file of the store is not what was written; `offsetBytes` is where this was noticed.
    case damaged(path: String, offsetBytes: UInt64, what: String)
    /// A block does not match the checksum that its layer keeps for it.
    case badBlock(volume: String, block: UInt64, segment: UInt32, layer: UInt64)
    /// `errno` is positive.
    case io(errno: Int32, what: String)
    /// The epoch was abandoned: by its owner, by a newer epoch of the group, or because the epoch before it failed.
    case abandoned(String)
    case closed

    public var description: String {
        switch self {
        case .full(let what): "the store is full: \(what)"
        case .fenced(let group, let current):
            "group \(group) is fenced: it is at \(current) now; an older source must stop"
        case .unknownGroup(let group): "the store has no group \(group)"
        case .unknownRecoveryPoint(let group, let point): "group \(group) has no recovery point \(point)"
        case .unknownFork(let fork): "the store has no fork \(fork)"
        case .shrunk(let volume, let now, let was):
            "disk \(volume) is \(sizeInWords(now)) now, was \(sizeInWords(was)): a disk must not shrink; protect it as a new group"
        case .invalid(let what): what
        case .busy(let what): what
        case .versionTooNew(let path, let found, let supported):
            "\(path) has format version \(found), this program knows up to \(supported): use a newer afterimage"
        case .versionTooOld(let path, let found, let supported):
            "\(path) has format version \(found), this program reads \(supported) only: use the afterimage that wrote it, or begin a new store in an empty directory"
        case .damaged(let path, let offset, let what): "\(path) is damaged at byte \(offset): \(what)"
        case .badBlock(let volume, let block, let segment, let layer):
            "disk \(volume): block \(block) does not match its checksum (segment \(segment), layer \(layer))"
        case .io(let errno, let what): "\(what): \(errorText(errno))"
        case .abandoned(let why): "the epoch was abandoned: \(why)"
        case .closed: "the store is closed"
        }
    }
}

/// 4194304 → "4 MiB"; exact binary units only, bytes otherwise.
func sizeInWords(_ bytes: UInt64) -> String {
    for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] as [(String, UInt64)]
    where bytes > 0 && bytes & ((1 << shift) - 1) == 0 {
        return "\(bytes >> shift) \(unit)"
    }
    return "\(bytes) bytes"
}
