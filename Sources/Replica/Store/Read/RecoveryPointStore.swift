import BlockTap
import Glibc

/// A volume at a recovery point as a read-only `BlockStore`: for file-level restore, checks and copies. A block that does not match
/// its checksum is EIO and a line in the log. Nothing may be in flight when it is released.
public final class RecoveryPointStore: BlockStore {
    public let geometry: BlockGeometry
    public var isReadOnly: Bool { true }
    public var supportsTrim: Bool { false }
    private let reader: VolumeReader
    private let loop: EventLoop
    private var reads: BlockReads?

    public init(reader: VolumeReader, loop: EventLoop) {
        self.reader = reader
        self.loop = loop
        geometry = reader.geometry
    }

    /// For tests and figures: runs read before they were asked for. While nothing is in flight.
    var readAheadCount: Int { reads?.readAheadCount ?? 0 }

    deinit {
        guard let reads else { return }
        if loop.isCurrent { return reads.end() }
        nonisolated(unsafe) let last = reads
        loop.execute { last.end() }
    }

    public func submit(_ request: BlockRequestPointer) {
        switch request.pointee.operation {
        case .read:
            if reads == nil { reads = .start(map: reader.map, loop: loop) }
            reads!.submit(request)
        case .flush:
            request.complete()
        case .write, .trim, .writeZeroes:
            request.complete(error: EPERM)
        }
    }
}
