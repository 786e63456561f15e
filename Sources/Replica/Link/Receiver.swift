import BlockTap
import CLZ4
import CXXHash
import Dispatch
import Logging
import NIOCore

/// The receiving end of one data stream: from frames to the epochs of a store's group, or onto disks. Confined to the connection's event loop.
///
/// Rules
/// - A block is appended only after it matched its checksum.
/// - ACK is sent from the store's seal callback and from nowhere else.
/// - An epoch is sealed only after the one before it was: a SEAL that comes early waits in `waitingSeal`; the sender, which never
///   has more than two unacknowledged epochs, sends no other before the ACK. The store holds to that by itself: each epoch says what
///   it goes on top of (`parent`), first of all on the position that WELCOME told the sender.
/// - Credits: what was received minus what the store wrote stays below the window. An epoch that ends returns what it
///   still held.
final class Receiver {
    /// An epoch's part in the credits. Apart from `OpenEpoch` so that the writer's callback does not keep the writer alive.
    private final class Account {
        var dataBytes: UInt64 = 0
        /// Of `dataBytes`, what has been given back as credit.
        var creditedBytes: UInt64 = 0
    }

    /// An epoch being received or sealed.
    private final class OpenEpoch {
        let cut: Cut
        let writer: any TargetEpoch
        let account = Account()
        var zeroBytes: UInt64 = 0
        var digest: UInt64 = 0
        init(cut: Cut, writer: any TargetEpoch) {
            self.cut = cut
            self.writer = writer
        }
    }

    let windowBytes: UInt64
    private let target: any EpochTarget
    /// Of a group in a store: what repairs blocks that it has lost.
    private let store: ReplicaStore?
    private let hello: DataHello
    private let handler: FrameHandler
    private let logger: Logger
    private var current: OpenEpoch?
    private var sealing: OpenEpoch?
    private var waitingSeal: (epoch: OpenEpoch, consistency: Consistency)?
    private var lastEpoch: EpochNumber = .none
    /// What the next epoch goes on top of.
    private var parent: DurablePosition?
    private var receivedBytes: UInt64 = 0
    private var creditedBytes: UInt64 = 0
    private var announcedCreditBytes: UInt64 = 0
    private var isEnded = false
    private var idlePromise: EventLoopPromise<Void>?
    /// The question that the agent has not answered yet.
    private var asked: (number: UInt64, blocks: [WantedBlock])?
    private var isAsking = false
    private var questionCount: UInt64 = 0
    private var repairTask: RepeatedTask?
    private let hashes: HashAnswers
    private var unpacked = UnsafeMutableRawBufferPointer(start: nil, count: 0)

    /// `position`: what WELCOME said.
    init(target: any EpochTarget, hello: DataHello, position: DurablePosition?, handler: FrameHandler, timing: LinkTiming, workers: HashWorkers, logger: Logger) {
        hashes = HashAnswers(target: target, hello: hello, handler: handler, workers: workers, fault: timing.fault, logger: logger)
        windowBytes = target.windowBytes
        self.target = target
        store = (target as? GroupTarget)?.store
        self.hello = hello
        parent = position
        self.handler = handler
        self.logger = logger
        guard hello.answersWanted == true, store != nil else { return }
        let bound = NIOLoopBound(WeakReceiver(self), eventLoop: handler.eventLoop)
        repairTask = handler.eventLoop.scheduleRepeatedTask(initialDelay: timing.repair, delay: timing.repair) { task in
            if let receiver = bound.value.receiver { receiver.ask() } else { task.cancel() }
        }
    }

    deinit { if unpacked.baseAddress != nil { unpacked.deallocate() } }

    var isWorking: Bool { sealing != nil }

    /// Stops taking frames and gives up the unfinished epoch; the future succeeds once no seal is under way any more, so that
    /// what the store says of the group then is final.
    func end(on eventLoop: any NIOCore.EventLoop) -> EventLoopFuture<Void> {
        isEnded = true
        repairTask?.cancel()
        repairTask = nil
        hashes.end()
        if let current { current.writer.abandon() }
        current = nil
        if let waitingSeal { waitingSeal.epoch.writer.abandon() }
        waitingSeal = nil
        guard sealing != nil else { return eventLoop.makeSucceededVoidFuture() }
        let promise = idlePromise ?? eventLoop.makePromise()
        idlePromise = promise
        return promise.futureResult
    }

    func received(_ frame: FrameView) throws(FrameError) {
        guard !isEnded else { return }
        var reader = MetaReader(frame)
        switch frame.header.type {
        case .epochBegin: try begin(EpochBeginMeta(&reader).cut)
        case .extents: try extents(frame, &reader)
        case .zero: try zero(frame, &reader)
        case .epochSeal: try seal(EpochSealMeta(&reader))
        case .epochAbandon: try abandon(EpochNumber(NumberMeta(&reader).value))
        case .blocks: try blocks(frame, BlocksMeta(&reader))
        case .resync:
            let meta = try ResyncMeta(&reader)
            guard meta.isWanted else { return hashes.end() }
            guard current == nil, sealing == nil, waitingSeal == nil else { throw .unexpected(.resync, "an epoch is under way") }
            try hashes.begin(at: parent)
        case .hashesWanted: try hashes.wanted(HashesWantedMeta(&reader))
        case .alive: break
        default: throw .unexpected(frame.header.type, "not part of a data stream from its sender")
        }
    }

    // MARK: One epoch

    private func begin(_ cut: Cut) throws(FrameError) {
        guard current == nil, waitingSeal == nil else { throw .unexpected(.epochBegin, "\(current?.cut.epoch.description ?? "an epoch") has not ended") }
        guard cut.epoch > lastEpoch else { throw .unexpected(.epochBegin, "\(cut.epoch) after \(lastEpoch)") }
        lastEpoch = cut.epoch
        do throws(StoreError) {
            let writer = try target.beginEpoch(cut, after: parent)
            let epoch = OpenEpoch(cut: cut, writer: writer)
            let bound = NIOLoopBound((self, epoch.account), eventLoop: handler.eventLoop)
            writer.onWritten = { count in
                bound.eventLoop.execute {
                    let (receiver, account) = bound.value
                    receiver.written(UInt64(count), of: account)
                }
            }
            current = epoch
        } catch {
            failed(error, cut.epoch)
        }
    }

    private func open(_ epoch: EpochNumber, _ type: FrameType) throws(FrameError) -> OpenEpoch {
        guard let current, current.cut.epoch == epoch else { throw .unexpected(type, "\(epoch) is not open") }
        return current
    }

    private func extents(_ frame: FrameView, _ reader: inout MetaReader) throws(FrameError) {
        let front = try ExtentsFront(&reader)
        let epoch = try open(front.epoch, .extents)
        receivedBytes &+= UInt64(front.plainBytes)
        guard receivedBytes &- creditedBytes <= windowBytes else { throw reader.malformed("it exceeds the credits granted") }
        let plain = try unpack(frame, front, reader)
        // The tables' place in the meta part is a multiple of 8 bytes, and the meta part is aligned to 16.
        let sums = UnsafeRawBufferPointer(rebasing: frame.meta[(ExtentsFront.bytes + front.extentCount * WireExtent.bytes)...])
            .bindMemory(to: UInt64.self)
        var offset = 0
        var block = 0
        for _ in 0..<front.extentCount {
            let extent = try reader.extent()
            let length = Int(extent.length)
            try check(extent, lengthBytes: UInt64(length), reader)
            let blocks = (length + blockBytes - 1) / blockBytes
            guard length <= plain.count - offset, blocks <= sums.count - block else { throw reader.malformed("its tables do not fit") }
            let bytes = UnsafeRawBufferPointer(rebasing: plain[offset..<(offset + length)])
            let checksums = UnsafeBufferPointer(rebasing: sums[block..<(block + blocks)])
            try verify(bytes, checksums, extent)
            do throws(StoreError) {
                try epoch.writer.append(
                    volume: Int(extent.volume), offsetBytes: extent.offsetBytes, bytes: bytes, checksums: checksums)
            } catch {
                return failed(error, epoch.cut.epoch)
            }
            offset += length
            block += blocks
        }
        guard offset == plain.count, block == sums.count else { throw reader.malformed("its tables do not fit") }
        epoch.account.dataBytes &+= UInt64(plain.count)
        epoch.digest = XXH3_64bits_withSeed(frame.meta.baseAddress, frame.meta.count, epoch.digest)
    }

    private func unpack(_ frame: FrameView, _ front: ExtentsFront, _ reader: MetaReader) throws(FrameError) -> UnsafeRawBufferPointer {
        switch front.encoding {
        case .plain:
            guard frame.payload.count == front.plainBytes else { throw reader.malformed("its payload does not fit") }
            return frame.payload
        case .lz4:
            if unpacked.count < front.plainBytes {
                if unpacked.baseAddress != nil { unpacked.deallocate() }
                unpacked = .allocate(byteCount: front.plainBytes, alignment: 4096)
            }
            let count = LZ4_decompress_safe(
                frame.payload.baseAddress?.assumingMemoryBound(to: CChar.self),
                unpacked.baseAddress?.assumingMemoryBound(to: CChar.self),
                Int32(frame.payload.count), Int32(front.plainBytes))
            guard count == Int32(front.plainBytes) else { throw reader.malformed("its payload does not unpack") }
            return UnsafeRawBufferPointer(rebasing: unpacked[..<front.plainBytes])
        }
    }

    /// Inside the volume, whole blocks except at its end.
    private func check(_ extent: WireExtent, lengthBytes: UInt64, _ reader: MetaReader) throws(FrameError) {
        guard extent.volume < hello.disks.count else { throw reader.malformed("volume \(extent.volume) does not exist") }
        let size = hello.disks[Int(extent.volume)].geometry.sizeBytes
        guard extent.offsetBytes % UInt64(blockBytes) == 0, lengthBytes > 0, extent.offsetBytes < size,
            lengthBytes <= size - extent.offsetBytes,
            lengthBytes % UInt64(blockBytes) == 0 || extent.offsetBytes + lengthBytes == size
        else {
            throw reader.malformed("bytes \(extent.offsetBytes) + \(lengthBytes) are not blocks of volume \(extent.volume)")
        }
    }

    private func verify(
        _ bytes: UnsafeRawBufferPointer, _ checksums: UnsafeBufferPointer<UInt64>, _ extent: WireExtent
    ) throws(FrameError) {
        let first = extent.offsetBytes / UInt64(blockBytes)
        for index in 0..<checksums.count {
            let start = index * blockBytes
            let sum = BlockChecksum.of(
                bytes.baseAddress! + start, count: min(blockBytes, bytes.count - start), blockIndex: first + UInt64(index))
            guard sum == UInt64(littleEndian: checksums[index]) else {
                throw .malformed(.extents, "block \(first + UInt64(index)) of disk \(hello.disks[Int(extent.volume)].name) does not match its checksum")
            }
        }
    }

    private func zero(_ frame: FrameView, _ reader: inout MetaReader) throws(FrameError) {
        let epoch = try open(EpochNumber(reader.u64()), .zero)
        while reader.remaining > 0 {
            let extent = try reader.extent()
            guard extent.volume < hello.disks.count else { throw reader.malformed("volume \(extent.volume) does not exist") }
            let size = hello.disks[Int(extent.volume)].geometry.sizeBytes
            let wanted = UInt64(extent.length) * UInt64(blockBytes)
            let length = extent.offsetBytes < size ? min(wanted, size - extent.offsetBytes) : 0
            guard wanted - length < UInt64(blockBytes) else { throw reader.malformed("zeroes past the end of volume \(extent.volume)") }
            try check(extent, lengthBytes: length, reader)
            do throws(StoreError) {
                try epoch.writer.zero(volume: Int(extent.volume), offsetBytes: extent.offsetBytes, lengthBytes: length)
            } catch {
                return failed(error, epoch.cut.epoch)
            }
            epoch.zeroBytes &+= length
        }
        epoch.digest = XXH3_64bits_withSeed(frame.meta.baseAddress, frame.meta.count, epoch.digest)
    }

    private func abandon(_ number: EpochNumber) throws(FrameError) {
        let epoch = try open(number, .epochAbandon)
        epoch.writer.abandon()
        current = nil
        returnCredits(of: epoch.account)
    }

    // MARK: Making it durable

    private func seal(_ meta: EpochSealMeta) throws(FrameError) {
        let epoch = try open(meta.epoch, .epochSeal)
        guard meta.dataBytes == epoch.account.dataBytes, meta.zeroBytes == epoch.zeroBytes, meta.digest == epoch.digest else {
            throw .malformed(.epochSeal, "\(meta.epoch) is not what was sent (\(epoch.account.dataBytes) of \(meta.dataBytes) bytes of data)")
        }
        current = nil
        parent = epoch.writer.positionWhenSealed
        if sealing == nil {
            start(epoch, meta.consistency)
        } else {
            waitingSeal = (epoch, meta.consistency)
        }
    }

    private func start(_ epoch: OpenEpoch, _ consistency: Consistency) {
        sealing = epoch
        let bound = NIOLoopBound((self, epoch), eventLoop: handler.eventLoop)
        epoch.writer.seal(consistency: consistency) { result in
            bound.eventLoop.execute {
                let (receiver, epoch) = bound.value
                receiver.sealed(epoch, result)
            }
        }
    }

    private func sealed(_ epoch: OpenEpoch, _ result: Result<RecoveryPoint?, StoreError>) {
        sealing = nil
        returnCredits(of: epoch.account)
        switch result {
        case .success:
            if !isEnded { handler.send(.ack) { NumberMeta(epoch.cut.epoch.rawValue).write(&$0) } }
            if let (next, consistency) = waitingSeal {
                waitingSeal = nil
                start(next, consistency)
            }
        case .failure(let error):
            if !isEnded { failed(error, epoch.cut.epoch) }
        }
        if sealing == nil { idlePromise?.succeed() }
    }

    /// The store does not take this epoch: nothing after it may be taken either.
    private func failed(_ error: StoreError, _ epoch: EpochNumber) {
        logger.error("cannot take \(epoch) of group \(hello.group): \(error)")
        _ = end(on: handler.eventLoop)
        switch error {
        case .fenced(_, let current):
            handler.finish(.fenced, { NumberMeta(current.rawValue).write(&$0) }, reason: "\(error)")
        case .full:
            handler.refuse(Refusal(.storeFull, "\(error)"))
        default:
            handler.refuse(Refusal(.storeError, "\(error)"))
        }
    }

    // MARK: Repair

    /// Asks the source for blocks that the store has lost, when there are any. The store is asked on another thread: what is bad may take some
    /// time to find out.
    private func ask() {
        guard !isEnded, !isAsking, asked == nil, let store, store.scrubber.hasBadBlocks else { return }
        isAsking = true
        let bound = NIOLoopBound(self, eventLoop: handler.eventLoop)
        let group = hello.group
        DispatchQueue.global(qos: .utility).async {
            var wanted = store.wantedBlocks(group, limit: FrameLimits.wantedBlocksMax)
            if let volume = wanted.first?.volume { wanted.removeAll { $0.volume != volume } }
            let blocks = wanted
            bound.eventLoop.execute { bound.value.ask(blocks) }
        }
    }

    private func ask(_ wanted: [WantedBlock]) {
        isAsking = false
        guard !isEnded, let first = wanted.first, first.volume < hello.disks.count else { return }
        questionCount += 1
        asked = (questionCount, wanted)
        let meta = BlocksWantedMeta(question: questionCount, volume: first.volume, blocks: wanted.map { .init(block: $0.block, checksum: $0.checksum, byteCount: $0.byteCount) })
        handler.send(.blocksWanted) { meta.write(&$0) }
    }

    /// The agent's answer: only what was asked for, and only bytes that match.
    private func blocks(_ frame: FrameView, _ meta: BlocksMeta) throws(FrameError) {
        guard let store, let (number, wanted) = asked, number == meta.question else { throw .unexpected(.blocks, "nobody asked") }
        guard frame.payload.count == meta.places.count * blockBytes, meta.places.last ?? 0 < wanted.count else { throw .malformed(.blocks, "its payload does not fit") }
        asked = nil
        var found: [(WantedBlock, [UInt8])] = []
        for (index, place) in meta.places.enumerated() {
            let bytes = Array(frame.payload[(index * blockBytes)..<(index * blockBytes + wanted[place].byteCount)])
            let sum = bytes.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: $0.count, blockIndex: wanted[place].block) }
            guard sum == wanted[place].checksum else { throw .malformed(.blocks, "block \(wanted[place].block) is not the one that was asked for") }
            found.append((wanted[place], bytes))
        }
        isAsking = true
        let bound = NIOLoopBound(self, eventLoop: handler.eventLoop)
        let (group, logger) = (hello.group, logger)
        let answered = found
        DispatchQueue.global(qos: .utility).async {
            let had = Set(answered.map(\.0))
            store.notRepaired(wanted.filter { !had.contains($0) }, group: group, why: "the source has something else there now")
            do throws(StoreError) {
                let repaired = Set(answered.isEmpty ? [] : try store.repair(group, answered))
                // The layers that have taken their place are known to be bad when the next pass has read them.
                store.notRepaired(had.filter { !repaired.contains($0) }, group: group, why: "its layer was merged meanwhile; the next pass finds it again")
            } catch {
                logger.error("cannot repair blocks with what the source sent: \(error)")
                // Not to be tried again and again; the next pass finds them anew.
                store.notRepaired(Array(had), group: group, why: "\(error)")
            }
            bound.eventLoop.execute { bound.value.isAsking = false }
        }
    }

    // MARK: Credits

    private func written(_ count: UInt64, of account: Account) {
        let count = min(count, account.dataBytes &- account.creditedBytes)
        account.creditedBytes &+= count
        grant(count)
    }

    /// An epoch that has ended holds no memory any more, whether its last bytes were written or thrown away.
    private func returnCredits(of account: Account) {
        let held = account.dataBytes &- account.creditedBytes
        account.creditedBytes = account.dataBytes
        grant(held)
    }

    private func grant(_ count: UInt64) {
        creditedBytes &+= count
        guard !isEnded else { return }
        // Small grants are put together, but never so long that a sender could wait for one that is held back here.
        guard creditedBytes &- announcedCreditBytes >= 1 << 20 || creditedBytes == receivedBytes else { return }
        guard creditedBytes != announcedCreditBytes else { return }
        announcedCreditBytes = creditedBytes
        handler.send(.credit) { NumberMeta(creditedBytes).write(&$0) }
    }
}

/// A timer must not keep the receiver of a stream that has ended.
private final class WeakReceiver {
    weak var receiver: Receiver?
    init(_ receiver: Receiver) { self.receiver = receiver }
}
