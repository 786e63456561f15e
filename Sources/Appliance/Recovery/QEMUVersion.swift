import Foundation
import Subprocess

/// What `qemu-system-x86_64 --version` says.
public struct QEMUVersion: Sendable, Hashable, CustomStringConvertible {
    public var major: Int
    public var text: String
    public var description: String { text }

    /// Throws when QEMU is not there or does not run (a library of its missing, for instance).
    public static func of(_ executable: String) async throws(ApplianceError) -> QEMUVersion {
        guard FileManager.default.isExecutableFile(atPath: executable) else {
            throw .failed("cannot start a machine: there is no QEMU at \(executable) (install qemu-system-x86, or set the path with afterimage appliance --qemu)")
        }
        let output: String
        do {
            let record = try await run(.path(.init(executable)), arguments: ["--version"], output: .string(limit: 4096), error: .string(limit: 4096))
            guard record.terminationStatus.isSuccess else {
                throw ApplianceError.failed("cannot start a machine: \(executable) --version failed: \(record.standardError)")
            }
            output = record.standardOutput
        } catch let error as ApplianceError {
            throw error
        } catch {
            throw .failed("cannot start a machine: \(executable) --version failed: \(error)")
        }
        guard let version = QEMUVersion(parsing: output) else {
            throw .failed("cannot start a machine: \(executable) --version says \(output.prefix(80)), which is not a QEMU version")
        }
        return version
    }

    /// "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)"
    init?(parsing output: String) {
        guard let match = output.firstMatch(of: /version (([0-9]+)\.[0-9.]+)/), let major = Int(match.2) else { return nil }
        self.major = major
        self.text = "QEMU \(match.1)"
    }

    /// A warning for the task's log, or nil. QEMU before 10 computes EFLAGS wrongly for cmpxchg16b under TCG (seen with Debian's
    /// 7.2): guest kernels of Linux 6.12 crashed in one boot of five, and user programs are affected too.
    func warning(_ accelerator: Accelerator) -> String? {
        guard accelerator == .tcg, major < 10 else { return nil }
        return "WARNING: \(text) without KVM emulates the instruction cmpxchg16b wrongly: the machine may crash or corrupt its data. Use QEMU 10 or newer."
    }
}
