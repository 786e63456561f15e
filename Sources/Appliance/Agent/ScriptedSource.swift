import BlockTap
import Foundation
import Logging
import Replica
import Subprocess
import Synchronization

/// A source whose application-consistent cuts have a script before and one after: the first tells the applications to put what they hold into their
/// files and to wait, the second that they may go on.
final class ScriptedSource: EpochSource {
    struct Scripts: Sendable, Hashable {
        /// Absolute paths of programs on the agent's host.
        var before: String?
        var after: String?
        var limitSeconds = 60
        /// Made before the first script, removed after the second.
        var pendingFile: String
    }

    /// While somebody holds the host's file systems still no script is run, which may want to write to them.
    final class Pause: Sendable {
        private let running: Running
        fileprivate init(_ running: Running) {
            self.running = running
            running.now.withLock { $0.pauses += 1 }
        }
        deinit { running.now.withLock { $0.pauses -= 1 } }
    }

    fileprivate final class Running: Sendable {
        let now = Mutex((pauses: 0, cuts: 0))
    }

    private let running = Running()
    private let inner: any EpochSource
    private let scripts: Scripts
    private let logger: Logger

    init(_ inner: any EpochSource, _ scripts: Scripts, logger: Logger) {
        self.inner = inner
        self.scripts = scripts
        self.logger = logger
    }

    var instance: String { inner.instance }
    var disks: [SourceDisk] { inner.disks }
    // The link asks the type: the inline and the live tap's are the same.
    static var drainBufferBytes: Int { LiveTapGroup.drainBufferBytes }
    func beginFullSync() { inner.beginFullSync() }
    var needsFuzzyCut: Bool { get async { await inner.needsFuzzyCut } }
    func hurry() { inner.hurry() }
    func nextItem() -> DrainItem? { inner.nextItem() }
    func setWakeup(_ wakeup: (@Sendable () -> Void)?) { inner.setWakeup(wakeup) }
    func release(_ buffer: DrainBuffer) { inner.release(buffer) }
    func acknowledge(_ epoch: EpochNumber) { inner.acknowledge(epoch) }
    func abandonAll() async { await inner.abandonAll() }
    var statistics: SourceStatistics { get async { await inner.statistics } }
    func read(disk: Int, offsetBytes: UInt64, lengthBytes: Int) async -> [UInt8]? { await inner.read(disk: disk, offsetBytes: offsetBytes, lengthBytes: lengthBytes) }

    func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut {
        guard consistency == .application else { return try await inner.cut(fuzzyBytesMax: fuzzyBytesMax, consistency: consistency) }
        guard scripts.before != nil || scripts.after != nil else {
            logger.warning("an application-consistent recovery point was asked for, but this agent has no scripts (--pre-script, --post-script): the file systems are frozen")
            return try await inner.cut(fuzzyBytesMax: fuzzyBytesMax, consistency: .fileSystem)
        }
        let isPaused = running.now.withLock { now in
            if now.pauses == 0 { now.cuts += 1 }
            return now.pauses > 0
        }
        if isPaused { return try await inner.cut(fuzzyBytesMax: fuzzyBytesMax, consistency: .crash) }
        defer { running.now.withLock { $0.cuts -= 1 } }
        // Whoever kills this process in between must not leave the applications waiting.
        try KeyFile.write("", to: scripts.pendingFile, mode: 0o600)
        var isReady = true
        if let before = scripts.before { isReady = await run(before, "pre") }
        let result: Result<Cut, any Error>
        do { result = .success(try await inner.cut(fuzzyBytesMax: fuzzyBytesMax, consistency: .fileSystem)) } catch { result = .failure(error) }
        await finishPending()
        var cut = try result.get()
        // Behind an inline tap the file systems are somebody else's: a virtual machine's, which the script knows.
        if isReady, let proof = cut.proof, proof.consistency == .fileSystem || proof.method == .copyBeforeWrite { cut.proof!.consistency = .application }
        return cut
    }

    /// From its return on no script is run, for as long as the pause is there.
    func pause() async throws -> Pause {
        let pause = Pause(running)
        while running.now.withLock({ $0.cuts > 0 }) { try await Task.sleep(for: .milliseconds(20)) }
        return pause
    }

    /// Runs the second script if the first one was run, by this process or one before it.
    func finishPending() async {
        guard FileManager.default.fileExists(atPath: scripts.pendingFile) else { return }
        if let after = scripts.after { _ = await run(after, "post") }
        try? FileManager.default.removeItem(atPath: scripts.pendingFile)
    }

    /// Whether it ended well, and in time.
    private func run(_ path: String, _ phase: String) async -> Bool {
        do {
            let limit = scripts.limitSeconds
            let status = try await withThrowingTaskGroup(of: TerminationStatus?.self) { group in
                group.addTask {
                    // Cancelled, it is killed, with all that it has started.
                    try await Subprocess.run(
                        .path(.init(path)), environment: .inherit.updating(["AFTERIMAGE_PHASE": phase]), platformOptions: .ended(withChildrenAfterSeconds: 0),
                        output: .discarded, error: .discarded
                    ).terminationStatus
                }
                group.addTask {
                    try? await Task.sleep(for: .seconds(limit))
                    return nil
                }
                defer { group.cancelAll() }
                return try await group.next() ?? nil
            }
            guard let status else {
                logger.error("the \(phase)-script \(path) did not end within \(limit) s and was killed")
                return false
            }
            guard status.isSuccess else {
                logger.error("the \(phase)-script \(path) failed: \(status)")
                return false
            }
            return true
        } catch {
            logger.error("cannot run the \(phase)-script \(path): \(error)")
            return false
        }
    }
}
