import BlockTap
import CIoUring
import Glibc
import Synchronization

/// Raw disks that epochs are written onto, in place: what a machine had before, brought up to what its fork is now.
///
/// - Every byte is written by one thread, in the order in which it came; a seal is answered after all disks are synced (`fdatasync`).
/// - The disks hold an epoch completely from its seal until the next one begins: in between they are in the middle of it. What was given up is
///   written again by what follows, since a sender's next epoch has all that was not acknowledged.
/// - What the disks held at first has a position of its own, a name only, so that it can be compared. A new object never trusts what an earlier
///   one wrote: whoever had the disks meanwhile may have written to them, and comparing tells.
public final class DiskTarget: EpochTarget, @unchecked Sendable {
    public struct Disk: Sendable {
        public var spec: VolumeSpec
        public var device: BlockDevice
        public init(spec: VolumeSpec, device: BlockDevice) {
            self.spec = spec
            self.device = device
        }
    }

    final class Volume: ComparedVolume {
        let geometry: BlockGeometry
        let device: BlockDevice
        init(_ disk: Disk) {
            geometry = disk.spec.geometry
            device = disk.device
        }

        func piece(at block: UInt64, end: UInt64) -> (hasData: Bool, end: UInt64) { (true, end) }

        func read(offsetBytes: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(StoreError) {
            var done = 0
            while done < buffer.count {
                let count = pread(device.fd, buffer.baseAddress! + done, buffer.count - done, off_t(offsetBytes) + off_t(done))
                if count < 0, errno == EINTR { continue }
                guard count > 0 else { throw .io(errno: count == 0 ? EIO : errno, what: "cannot read \(device.path) at byte \(offsetBytes)") }
                done += count
            }
        }
    }

    public struct Figures: Sendable, Equatable {
        public var writtenBytes: UInt64 = 0
        public var zeroedBytes: UInt64 = 0
        public var position: DurablePosition
        /// An epoch has begun since: the disks are neither what they were nor what they will be.
        public var isInTheMiddle = false
        /// Why nothing more is written.
        public var failure: StoreError?
    }

    let windowBytes: UInt64 = 16 << 20
    let isBusyElsewhere = false
    let volumes: [Volume]
    private let thread = StoreThread()
    private let state: Mutex<Figures>

    /// The devices must have been opened for writing, exclusively. Throws `.invalid` when one cannot hold its disk.
    public init(disks: [Disk]) throws(StoreError) {
        for disk in disks {
            let size = disk.spec.geometry.sizeBytes
            guard disk.device.geometry.sizeBytes >= size else {
                throw .invalid("\(disk.device.path) has \(sizeInWords(disk.device.geometry.sizeBytes)), disk \(disk.spec.name) needs \(sizeInWords(size)): attach one that is large enough")
            }
            guard size % UInt64(disk.device.geometry.logicalBlockBytes) == 0 else {
                throw .invalid("disk \(disk.spec.name) has \(size) bytes, which do not end at a block of \(disk.device.path) (\(disk.device.geometry.logicalBlockBytes) bytes)")
            }
        }
        volumes = disks.map(Volume.init)
        // The epoch's number says nothing; it is compared within one connection.
        state = Mutex(Figures(position: DurablePosition(instance: "disks-\(UInt64.random(in: .min ... .max))", epoch: EpochNumber(1), kind: .fuzzy)))
    }

    public var figures: Figures { state.withLock { $0 } }

    /// Ends its thread once everything queued is written. Nothing may follow.
    public func close() { thread.stop() }

    // MARK: EpochTarget

    func beginEpoch(_ cut: Cut, after parent: DurablePosition?) throws(StoreError) -> any TargetEpoch {
        try state.withLock { state throws(StoreError) in
            if let failure = state.failure { throw failure }
        }
        return Epoch(self, cut)
    }

    func openNewest(isOldest: Bool) -> (position: DurablePosition, volumes: [any ComparedVolume])? {
        (figures.position, volumes)
    }

    /// The position's instance is the sender's; before the first seal it is the disks' own.
    func take(_ instance: String) { sender.withLock { $0 = instance } }
    private let sender = Mutex("")

    final class Epoch: TargetEpoch, @unchecked Sendable {
        var onWritten: (@Sendable (Int) -> Void)?
        let positionWhenSealed: DurablePosition
        private let target: DiskTarget

        init(_ target: DiskTarget, _ cut: Cut) {
            self.target = target
            positionWhenSealed = DurablePosition(instance: target.sender.withLock { $0 }, epoch: cut.epoch, kind: cut.kind)
        }

        func append(volume: Int, offsetBytes: UInt64, bytes: UnsafeRawBufferPointer, checksums: UnsafeBufferPointer<UInt64>) throws(StoreError) {
            let copy = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: pageBytes)
            copy.copyMemory(from: bytes)
            nonisolated(unsafe) let memory = copy
            let (target, onWritten) = (target, onWritten)
            let accepted = target.thread.enqueue {
                target.write(volume, offsetBytes, UnsafeRawBufferPointer(memory))
                let count = memory.count
                memory.deallocate()
                onWritten?(count)
            }
            if !accepted {
                copy.deallocate()
                throw .closed
            }
        }

        func zero(volume: Int, offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) {
            let target = target
            guard target.thread.enqueue({ target.zero(volume, offsetBytes, lengthBytes) }) else { throw .closed }
        }

        func seal(consistency: Consistency, done: @escaping @Sendable (Result<RecoveryPoint?, StoreError>) -> Void) {
            let (target, position) = (target, positionWhenSealed)
            if !target.thread.enqueue({ done(target.seal(position)) }) { done(.failure(.closed)) }
        }

        /// What was written of it stays: see the class.
        func abandon() {}
    }

    // MARK: On the thread

    private func guarded(_ body: () throws(StoreError) -> Void) {
        let goesOn = state.withLock { state in
            state.isInTheMiddle = true
            return state.failure == nil
        }
        guard goesOn else { return }
        do throws(StoreError) { try body() } catch { state.withLock { $0.failure = error } }
    }

    private func write(_ volume: Int, _ offset: UInt64, _ bytes: UnsafeRawBufferPointer) {
        guarded { () throws(StoreError) in
            try writeNow(volume, offset, bytes)
            state.withLock { $0.writtenBytes += UInt64(bytes.count) }
        }
    }

    private func writeNow(_ volume: Int, _ offset: UInt64, _ bytes: UnsafeRawBufferPointer) throws(StoreError) {
        let device = volumes[volume].device
        var done = 0
        while done < bytes.count {
            let count = pwrite(device.fd, bytes.baseAddress! + done, bytes.count - done, off_t(offset) + off_t(done))
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw .io(errno: count == 0 ? EIO : errno, what: "cannot write \(device.path) at byte \(offset)") }
            done += count
        }
    }

    private func zero(_ volume: Int, _ offset: UInt64, _ length: UInt64) {
        guarded { () throws(StoreError) in
            let device = volumes[volume].device
            var isDone = false
            if device.canPunchHoles {
                var result = ciouring_fallocate(device.fd, FileAllocation.punchHole, offset, length)
                while result == -EINTR { result = ciouring_fallocate(device.fd, FileAllocation.punchHole, offset, length) }
                isDone = result == 0
            }
            if !isDone {
                let zeroes = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: pageBytes)
                defer { zeroes.deallocate() }
                zeroes.initializeMemory(as: UInt8.self, repeating: 0)
                var done: UInt64 = 0
                while done < length {
                    let count = Int(min(length - done, UInt64(zeroes.count)))
                    try writeNow(volume, offset + done, UnsafeRawBufferPointer(rebasing: zeroes[..<count]))
                    done += UInt64(count)
                }
            }
            state.withLock { $0.zeroedBytes += length }
        }
    }

    private func seal(_ position: DurablePosition) -> Result<RecoveryPoint?, StoreError> {
        guarded { () throws(StoreError) in
            for volume in volumes {
                var result = fdatasync(volume.device.fd)
                while result != 0, errno == EINTR { result = fdatasync(volume.device.fd) }
                guard result == 0 else { throw .io(errno: errno, what: "cannot sync \(volume.device.path)") }
            }
        }
        return state.withLock { state in
            if let failure = state.failure { return .failure(failure) }
            state.position = position
            state.isInTheMiddle = false
            return .success(nil)
        }
    }
}
