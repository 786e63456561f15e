import Appliance
import ArgumentParser

enum PolicyHelp {
    static let text =
        "Recovery Point Policy: standard, keep-all, or EVERY:FOR,… (one every EVERY for the last FOR), such as \(PolicyText.standard.tiers)."

    static func check(_ text: String?) throws {
        guard let text else { return }
        do { _ = try PolicyText(text) } catch { throw ValidationError("\(error)") }
    }

    /// `standard (all:10m,…)`
    static func words(_ text: String) -> String {
        guard let policy = try? PolicyText(text), policy.description != policy.tiers else { return text }
        return "\(text) (\(policy.tiers))"
    }
}
