import Foundation
import Glibc
import Subprocess

/// A program that an administrator has written, run on the appliance's host with a time limit.
struct HostScript: Sendable {
    /// Absolute.
    var path: String
    var arguments: [String] = []
    /// Beside the appliance's own.
    var environment: [String: String] = [:]
    var limitSeconds: Int

    private static let outputBytesMax = 64 << 10
    /// Between SIGTERM and SIGKILL.
    private static let graceSeconds = 2

    /// Why it cannot be run at all.
    static func refusal(_ path: String) -> String? {
        guard path.hasPrefix("/"), !path.utf8.contains(0) else { return "name a script by its absolute path on the appliance's host, not \(path)" }
        var isDirectory: ObjCBool = false
        guard FileManager.default.fileExists(atPath: path, isDirectory: &isDirectory), !isDirectory.boolValue else { return "there is no script \(path) on the appliance's host" }
        guard FileManager.default.isExecutableFile(atPath: path) else { return "\(path) is not executable (chmod +x)" }
        return nil
    }

    /// Runs it to its end; `log` gets what it wrote, however it ended. Throws when it failed, or did not end in time. It and its children are killed when the
    /// task is cancelled.
    ///
    /// Its output goes into a file: a child that it leaves behind would keep a pipe open, and this waiting.
    func run(log: @Sendable (String) async -> Void) async throws {
        if let refusal = Self.refusal(path) { throw ApplianceError.failed(refusal) }
        let file = try NamelessFile("afterimage-script")
        defer { file.close() }
        let outcome = await ended(output: file.fd)
        for line in Self.lines(file.fd) { await log(line) }
        try Task.checkCancellation()
        switch outcome {
        case .success(nil): throw ApplianceError.failed("\(path) did not end within \(limitSeconds) s and was killed")
        case .success(.exited(0)): return
        case .success(.exited(let code)): throw ApplianceError.failed("\(path) failed with exit code \(code)")
        case .success(let status?): throw ApplianceError.failed("\(path) was ended by a signal (\(status))")
        case .failure(let error): throw ApplianceError.failed("cannot run \(path): \(error)")
        }
    }

    /// nil: not in time.
    private func ended(output fd: Int32) async -> Result<TerminationStatus?, any Error> {
        let options = PlatformOptions.ended(withChildrenAfterSeconds: Self.graceSeconds)
        var variables: [Environment.Key: String?] = [:]
        for (name, value) in environment { variables[.init(stringLiteral: name)] = value }
        let (platform, added) = (options, variables)
        do {
            return .success(try await withThrowingTaskGroup(of: TerminationStatus?.self) { group in
                group.addTask {
                    try await Subprocess.run(
                        .path(.init(path)), arguments: .init(arguments), environment: .inherit.updating(added), platformOptions: platform,
                        output: .fileDescriptor(.init(rawValue: fd), closeAfterSpawningProcess: false), error: .fileDescriptor(.init(rawValue: fd), closeAfterSpawningProcess: false)
                    ).terminationStatus
                }
                group.addTask {
                    try await Task.sleep(for: .seconds(limitSeconds))
                    return nil
                }
                defer { group.cancelAll() }
                return try await group.next() ?? nil
            })
        } catch { return .failure(error) }
    }

    /// The first part of what was written, and how much there was of it.
    private static func lines(_ fd: Int32) -> [String] {
        var bytes = [UInt8](repeating: 0, count: outputBytesMax)
        let count = max(0, bytes.withUnsafeMutableBytes { pread(fd, $0.baseAddress, $0.count, 0) })
        var lines = String(decoding: bytes[..<count], as: UTF8.self).split(whereSeparator: \.isNewline).map(String.init)
        var information = stat()
        if fstat(fd, &information) == 0, information.st_size > count { lines.append("(\(information.st_size - count) bytes more are not kept)") }
        return lines
    }
}
