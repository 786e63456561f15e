/// What tells a disk from others of its kind, wherever it is attached.
public enum DiskSerial {
    /// The serial number or world-wide name that the disk of this device has; nil when it has none, as loop devices and files.
    public static func of(path: String) -> String? {
        guard let number = DeviceNumber(path: path) else { return nil }
        let disk = Sysfs(number).disk
        for name in ["serial", "device/serial", "wwid", "device/wwid"] {
            guard let text = disk.attribute(name) else { continue }
            let words = text.split(whereSeparator: { $0 == " " || $0 == "\t" || $0 == "\n" }).joined(separator: " ")
            if !words.isEmpty { return words }
        }
        return nil
    }
}
