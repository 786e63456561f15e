import BlockTap
import Glibc
import Logging
import NIOCore
import Synchronization

/// The receiver's half of a resync on one data stream: keeps the newest state open and says what its blocks hash to. Confined to the
/// connection's event loop; reading and hashing is done by the `HashWorkers`.
///
/// The state is taken when the sender asks for it, with nothing of the stream under way, and held until the sender wants no more or the
/// stream ends. So it is what the next epoch goes on top of, and what it hashes to never changes, whatever is received, merged, moved or expires
/// meanwhile. Each block that is answered for was read from the disk for it, and was found to be what was written there.
final class HashAnswers {
    /// What is open. Workers hold it while they read, so that files stay until they are done.
    private final class Opened: Sendable {
        let volumes: [any ComparedVolume]
        let hasher: BlockHasher
        init(_ volumes: [any ComparedVolume], _ hasher: BlockHasher) {
            self.volumes = volumes
            self.hasher = hasher
        }
    }

    private enum State {
        case none
        case opening
        /// nil: cannot be compared.
        case open(Opened?)
    }

    private let target: any EpochTarget
    private let hello: DataHello
    private let handler: FrameHandler
    private let workers: HashWorkers
    private let fault: LinkFault?
    private let logger: Logger
    private var state = State.none
    /// Set when nobody wants the answers of the state any more.
    private var isUnwanted = HashWorkers.Flag()
    private var isEnded = false
    private var lastQuestion: UInt64 = 0
    private var openQuestionCount = 0

    init(target: any EpochTarget, hello: DataHello, handler: FrameHandler, workers: HashWorkers, fault: LinkFault?, logger: Logger) {
        self.target = target
        self.hello = hello
        self.handler = handler
        self.workers = workers
        self.fault = fault
        self.logger = logger
    }

    /// The sender wants no more, or the stream ends; what is under way is answered with nothing being read.
    func end() {
        isUnwanted.set()
        isUnwanted = HashWorkers.Flag()
        state = .none
    }

    /// `position`: of the state that the next epoch goes on top of.
    func begin(at position: DurablePosition?) throws(FrameError) {
        guard case .none = state else { throw .unexpected(.resync, "one is under way") }
        state = .opening
        let hasher = BlockHasher.random()
        let flag = isUnwanted
        let bound = NIOLoopBound(self, eventLoop: handler.eventLoop)
        let (target, group, logger, fault) = (target, hello.group, logger, fault)
        let accepted = workers.run {
            var opened: Opened?
            do throws(StoreError) {
                if let newest = try target.openNewest(isOldest: fault == .hashesTheOldest), newest.position == position {
                    opened = Opened(newest.volumes, hasher)
                }
            } catch {
                logger.error("cannot open what is here of group \(group) to compare it with its source: \(error)")
            }
            let result = opened
            bound.eventLoop.execute { bound.value.didOpen(result, position, hasher, flag) }
        }
        if !accepted { didOpen(nil, position, hasher, flag) }
    }

    private func didOpen(_ opened: Opened?, _ position: DurablePosition?, _ hasher: BlockHasher, _ flag: HashWorkers.Flag) {
        guard flag === isUnwanted, case .opening = state else { return }
        state = .open(opened)
        handler.send(.resyncReady) { ResyncReadyMeta(epoch: position?.epoch ?? .none, isReady: opened != nil, hasher: hasher).write(&$0) }
    }

    func wanted(_ wanted: HashesWantedMeta) throws(FrameError) {
        guard case .open(let opened?) = state else { throw .unexpected(.hashesWanted, "no resync is open") }
        guard wanted.question == lastQuestion + 1 else { throw .unexpected(.hashesWanted, "question \(wanted.question) after \(lastQuestion)") }
        guard opened.volumes.indices.contains(wanted.volume) else { throw .malformed(.hashesWanted, "there is no disk number \(wanted.volume)") }
        let blockCount = opened.volumes[wanted.volume].geometry.blockCount
        guard wanted.firstBlock < blockCount, UInt64(wanted.blockCount) <= blockCount - wanted.firstBlock else {
            throw .malformed(.hashesWanted, "blocks \(wanted.firstBlock) + \(wanted.blockCount) are not on a disk of \(blockCount)")
        }
        guard openQuestionCount < FrameLimits.hashQuestionsMax else { throw .unexpected(.hashesWanted, "\(openQuestionCount) questions are open") }
        lastQuestion = wanted.question
        openQuestionCount += 1
        let flag = isUnwanted
        let bound = NIOLoopBound(self, eventLoop: handler.eventLoop)
        let (target, workers) = (target, workers)
        let accepted = workers.run {
            let answer = workers.answer(wanted, opened.volumes[wanted.volume], opened.hasher, of: target, unless: flag)
            bound.eventLoop.execute { bound.value.answered(answer) }
        }
        if !accepted { answered(HashesMeta(question: wanted.question, runs: [.init(kind: .unreadable, count: wanted.blockCount)])) }
    }

    /// Answers for a resync that has ended are sent, too: the sender waits for as many as it asked for.
    private func answered(_ answer: HashesMeta) {
        openQuestionCount -= 1
        var answer = answer
        switch fault {
        case .answersUnasked: answer.question += 1 << 32
        case .answersLackABlock:
            answer.runs[answer.runs.count - 1].count -= 1
            if answer.runs.last?.kind == .hashed { answer.hashes.removeLast() }
        case .answersLackAHash: _ = answer.hashes.popLast()
        default: break
        }
        handler.send(.hashes) { answer.write(&$0) }
    }
}

/// Reads and hashes replicas for all resyncs of an appliance: two threads with low priority, one piece of 1 MiB at a time each, at a bounded rate,
/// slowly while epochs of other groups are being written. Never the store's own thread.
final class HashWorkers: Sendable {
    /// Set once, from any thread.
    final class Flag: Sendable {
        private let value = Atomic(false)
        func set() { value.store(true, ordering: .releasing) }
        var isSet: Bool { value.load(ordering: .acquiring) }
    }

    static let threadCount = 2
    static let pieceBlocks: UInt64 = 256
    /// A piece gives way to others' epochs for so long at most.
    static let yieldsMax = 4
    static let yieldMicroseconds: UInt32 = 4000

    private struct State {
        var threads: [StoreThread] = []
        var next = 0
        var isStopped = false
    }
    private let state = Mutex(State())
    private let throttle: Mutex<Throttle>
    private let isStopping = Flag()

    init(bytesPerSecond: UInt64) { throttle = Mutex(Throttle(bytesPerSecond: bytesPerSecond)) }

    deinit { stop() }

    /// False after `stop`: the job will not run.
    func run(_ job: @escaping @Sendable () -> Void) -> Bool {
        let thread = state.withLock { state -> StoreThread? in
            if state.isStopped { return nil }
            if state.threads.count < Self.threadCount {
                let thread = StoreThread()
                thread.enqueue { _ = setpriority(__priority_which_t(PRIO_PROCESS.rawValue), 0, 10) }
                state.threads.append(thread)
            }
            state.next = (state.next + 1) % Self.threadCount
            return state.threads[state.next % state.threads.count]
        }
        return thread?.enqueue(job) ?? false
    }

    /// What is under way ends soon, with blocks that nobody read.
    func stop() {
        isStopping.set()
        let threads = state.withLock { state -> [StoreThread] in
            state.isStopped = true
            defer { state.threads = [] }
            return state.threads
        }
        for thread in threads { thread.stop() }
    }

    // MARK: On a worker

    func answer(
        _ wanted: HashesWantedMeta, _ reader: any ComparedVolume, _ hasher: BlockHasher, of target: any EpochTarget, unless flag: Flag
    ) -> HashesMeta {
        var answer = HashesMeta(question: wanted.question)
        let end = wanted.firstBlock + UInt64(wanted.blockCount)
        var block = wanted.firstBlock
        var memory: UnsafeMutableRawBufferPointer?
        defer { memory?.deallocate() }
        while block < end {
            if flag.isSet || isStopping.isSet {
                answer.add(.unreadable, Int(end - block))
                break
            }
            let (hasData, pieceEnd) = reader.piece(at: block, end: end)
            guard hasData else {
                answer.add(.zero, Int(pieceEnd - block))
                block = pieceEnd
                continue
            }
            let limit = min(end, block + Self.pieceBlocks)
            var last = min(pieceEnd, limit)
            while last < limit {
                let (hasMore, nextEnd) = reader.piece(at: last, end: limit)
                guard hasMore else { break }
                last = nextEnd
            }
            let buffer = memory ?? .allocate(byteCount: Int(Self.pieceBlocks) * blockBytes, alignment: pageBytes)
            memory = buffer
            giveWay(Int(last - block) * blockBytes, target, flag)
            hash(block..<last, reader, hasher, buffer, &answer)
            block = last
        }
        return answer
    }

    /// What cannot be read is read again in smaller pieces: only the bad blocks are to be sent anew.
    private func hash(_ blocks: Range<UInt64>, _ reader: any ComparedVolume, _ hasher: BlockHasher, _ buffer: UnsafeMutableRawBufferPointer, _ answer: inout HashesMeta) {
        let offset = blocks.lowerBound * UInt64(blockBytes)
        let length = Int(min(blocks.upperBound * UInt64(blockBytes), reader.geometry.sizeBytes) - offset)
        do throws(StoreError) {
            try reader.read(offsetBytes: offset, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<length]))
        } catch {
            if blocks.count == 1 { return answer.add(.unreadable, 1) }
            let step = blocks.count > 16 ? UInt64(16) : 1
            for start in stride(from: blocks.lowerBound, to: blocks.upperBound, by: Int(step)) {
                hash(start..<min(start + step, blocks.upperBound), reader, hasher, buffer, &answer)
            }
            return
        }
        answer.add(.hashed, blocks.count)
        for start in stride(from: 0, to: length, by: blockBytes) {
            answer.hashes.append(hasher.hash(buffer.baseAddress! + start, count: min(blockBytes, length - start)))
        }
    }

    private func giveWay(_ byteCount: Int, _ target: any EpochTarget, _ flag: Flag) {
        var yields = 0
        while yields < Self.yieldsMax, !flag.isSet, !isStopping.isSet, target.isBusyElsewhere {
            usleep(Self.yieldMicroseconds)
            yields += 1
        }
        while !flag.isSet, !isStopping.isSet {
            let delay = throttle.withLock { throttle -> Int64 in
                let delay = throttle.delay(now: Int64(NIODeadline.now().uptimeNanoseconds))
                if delay == 0 { throttle.spend(byteCount) }
                return delay
            }
            if delay == 0 { return }
            usleep(UInt32(min(delay / 1000, 20_000)))
        }
    }
}
