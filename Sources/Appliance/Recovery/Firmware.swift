import Foundation

/// UEFI for a machine: EDK II's code, which all share, and the variables, of which each machine has a copy of its own.
struct FirmwareFiles: Sendable, Hashable {
    var code: String
    var variables: String

    /// Where distributions put them (Debian, Fedora, Arch, openSUSE), the 4 MiB builds first: the smaller ones are being given up.
    private static let pairs = [
        ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"), ("OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"), ("OVMF_CODE.fd", "OVMF_VARS.fd"),
        ("ovmf-x86_64-code.bin", "ovmf-x86_64-vars.bin"),
    ]
    static let standardDirectories = ["/usr/share/OVMF", "/usr/share/edk2/ovmf", "/usr/share/edk2/x64", "/usr/share/edk2-ovmf/x64", "/usr/share/qemu"]

    /// The first pair in `directories` and then where it usually is.
    static func find(_ directories: [String], standard: [String] = FirmwareFiles.standardDirectories) throws(ApplianceError) -> FirmwareFiles {
        for directory in directories + standard {
            for (code, variables) in pairs {
                let files = FirmwareFiles(code: "\(directory)/\(code)", variables: "\(directory)/\(variables)")
                if access(files.code, R_OK) == 0, access(files.variables, R_OK) == 0 { return files }
            }
        }
        throw .failed(
            "cannot start a machine with UEFI: there is no OVMF in \((directories + standard).joined(separator: ", ")) (apt-get install ovmf, or set the directory with afterimage appliance --ovmf; --firmware bios starts it with a BIOS)")
    }

    /// These with a copy of the variables at `path`, made once: what the machine has stored in them stays.
    func withOwnVariables(at path: String) throws(ApplianceError) -> FirmwareFiles {
        if access(path, F_OK) != 0 {
            let part = path + ".part"
            try? FileManager.default.removeItem(atPath: part)
            do {
                try FileManager.default.copyItem(atPath: variables, toPath: part)
                try FileManager.default.setAttributes([.posixPermissions: 0o600], ofItemAtPath: part)
                try FileManager.default.moveItem(atPath: part, toPath: path)
            } catch { throw .failed("cannot copy the firmware's variables to \(path): \(error.localizedDescription)") }
        }
        return FirmwareFiles(code: code, variables: path)
    }
}

/// What the beginning of a boot disk says of the firmware that can start it.
struct BootSectors: Sendable, Hashable {
    /// Boot code in the first sector, for a BIOS.
    var hasBootCode: Bool
    /// An EFI system partition.
    var hasSystemPartition: Bool

    /// Enough for a partition table of 128 entries on sectors of 4096 bytes.
    static let byteCount = 64 << 10

    /// C12A7328-F81F-11D2-BA4B-00A0C93EC93B as it lies on disk (UEFI specification 2.10, table 5.7 and appendix A).
    private static let systemPartitionType: [UInt8] = [0x28, 0x73, 0x2A, 0xC1, 0x1F, 0xF8, 0xD2, 0x11, 0xBA, 0x4B, 0x00, 0xA0, 0xC9, 0x3E, 0xC9, 0x3B]

    init(_ bytes: [UInt8]) {
        hasBootCode = bytes.count >= 512 && bytes[510] == 0x55 && bytes[511] == 0xAA && bytes[..<440].contains { $0 != 0 }
        hasSystemPartition = Self.masterBootRecordTypes(bytes).contains(0xEF) || [512, 4096].contains { Self.hasSystemPartition(bytes, sectorBytes: $0) }
    }

    private static func masterBootRecordTypes(_ bytes: [UInt8]) -> [UInt8] {
        guard bytes.count >= 512, bytes[510] == 0x55, bytes[511] == 0xAA else { return [] }
        return (0..<4).map { bytes[446 + 16 * $0 + 4] }
    }

    /// UEFI specification 2.10, 5.3: header in sector 1, entries where it says.
    private static func hasSystemPartition(_ bytes: [UInt8], sectorBytes: Int) -> Bool {
        func number(_ at: Int, _ width: Int) -> Int? {
            guard at >= 0, at + width <= bytes.count else { return nil }
            return Int(exactly: bytes[at..<(at + width)].reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) })
        }
        guard bytes.count >= 2 * sectorBytes, Array(bytes[sectorBytes..<(sectorBytes + 8)]) == Array("EFI PART".utf8),
            let first = number(sectorBytes + 72, 8), let count = number(sectorBytes + 80, 4), let size = number(sectorBytes + 84, 4), size >= 128, first < 1 << 20
        else { return false }
        for entry in 0..<min(count, 256) {
            let at = first * sectorBytes + entry * size
            guard at + 16 <= bytes.count else { return false }
            if Array(bytes[at..<(at + 16)]) == systemPartitionType { return true }
        }
        return false
    }
}
