import Foundation
import Subprocess
import Synchronization

/// A program of the appliance's host that a step is left to: qemu-img, nbdfuse, losetup, mount.
struct HostProgram: Sendable {
    var path: String
    private static let outputBytesMax = 64 << 10

    /// Throws, naming the Debian package, when it is not there.
    static func find(_ name: String, package: String) throws(ApplianceError) -> HostProgram {
        let inherited = ProcessInfo.processInfo.environment["PATH"]?.split(separator: ":").map(String.init) ?? []
        for directory in inherited + ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
            let path = "\(directory)/\(name)"
            if directory.hasPrefix("/"), FileManager.default.isExecutableFile(atPath: path) { return HostProgram(path: path) }
        }
        throw .failed("this needs \(name) on the appliance's host: install it (apt-get install \(package))")
    }

    struct Outcome: Sendable {
        var isSuccess: Bool
        var output: String
        var errors: String
        /// What it complained of, in one line.
        var complaint: String {
            let text = errors.isEmpty ? output : errors
            return text.split(whereSeparator: \.isNewline).map { $0.trimmingCharacters(in: .whitespaces) }.filter { !$0.isEmpty }.joined(separator: "; ")
        }
    }

    /// Runs it to its end. A task that is cancelled kills it. `input` is what it reads.
    func outcome(_ arguments: [String], input: String = "") async throws -> Outcome {
        let record = try await Subprocess.run(
            .path(.init(path)), arguments: .init(arguments), input: .string(input), output: .string(limit: Self.outputBytesMax),
            error: .string(limit: Self.outputBytesMax))
        try Task.checkCancellation()
        return Outcome(isSuccess: record.terminationStatus.isSuccess, output: record.standardOutput, errors: record.standardError)
    }

    /// As `outcome`; its output. Throws with its own words when it fails.
    @discardableResult
    func run(_ arguments: [String], doing what: String) async throws -> String {
        let outcome = try await outcome(arguments)
        guard outcome.isSuccess else { throw ApplianceError.failed("cannot \(what): \(outcome.complaint)") }
        return outcome.output
    }
}

/// Runs what blocks for long on a thread of its own: the shared threads are for what a failover may have to wait for.
/// `body` asks `isCancelled` now and then and throws when it says yes.
func onThread<T: Sendable>(_ name: String, _ body: @escaping @Sendable (_ isCancelled: @escaping @Sendable () -> Bool) throws -> T) async throws -> T {
    let flag = CancelFlag()
    return try await withTaskCancellationHandler {
        try await withCheckedThrowingContinuation { done in
            let thread = Thread {
                done.resume(with: Result { try body { flag.isRaised } })
            }
            thread.name = name
            thread.start()
        }
    } onCancel: {
        flag.raise()
    }
}

final class CancelFlag: Sendable {
    private let raised = Atomic(false)
    var isRaised: Bool { raised.load(ordering: .acquiring) }
    func raise() { raised.store(true, ordering: .releasing) }
}
