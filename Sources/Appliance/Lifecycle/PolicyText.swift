import Replica

/// A Recovery Point Policy as people write it: `EVERY:FOR`, joined by commas, each "one every EVERY for the last FOR".
///
///     all:10m,10m:1h,1h:24h,1d:7d
///
/// EVERY is `all` or a length of time, FOR a length of time: a whole number of s, m, h, d or w. `standard` is the line above;
/// `keep-all` drops nothing by age.
public struct PolicyText: Sendable, Hashable, CustomStringConvertible {
    /// nil: everything is kept.
    public let policy: RecoveryPointPolicy?
    /// As it is kept and shown.
    public let description: String

    public static let standard = PolicyText(policy: .standard, description: "standard")

    private init(policy: RecoveryPointPolicy?, description: String) {
        self.policy = policy
        self.description = description
    }

    public init(_ text: String) throws(ApplianceError) {
        switch text {
        case "standard":
            self = .standard
            return
        case "keep-all":
            self.init(policy: nil, description: text)
            return
        default: break
        }
        func refusal(_ what: String) -> ApplianceError {
            .invalid("\(what): a Recovery Point Policy is standard, keep-all, or EVERY:FOR,… such as \(Self.words(.standard))")
        }
        var tiers: [RecoveryPointPolicy.Tier] = []
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            let pair = part.split(separator: ":", omittingEmptySubsequences: false)
            guard pair.count == 2, let every = pair[0] == "all" ? 0 : Self.seconds(pair[0]), let span = Self.seconds(pair[1]) else {
                throw refusal("cannot understand \"\(part)\"")
            }
            guard every <= span else { throw refusal("\"\(part)\" keeps nothing, since \(pair[0]) is longer than \(pair[1])") }
            tiers.append(.init(everySeconds: every, forSeconds: span))
        }
        let policy = RecoveryPointPolicy(tiers: tiers)
        do throws(StoreError) { try policy.validated() } catch { throw refusal("\(error)") }
        self.init(policy: policy, description: policy == .standard ? "standard" : Self.words(policy))
    }

    /// In full, also when it has a name.
    public var tiers: String { policy.map(Self.words) ?? "everything" }

    private static let units: [(letter: Character, seconds: Int)] = [("w", 7 * 86_400), ("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)]

    /// `90s`, `10m`, `24h`, `7d`, `1w`; nil for anything else.
    public static func seconds(_ text: Substring) -> Int? {
        guard let unit = units.first(where: { $0.letter == text.last }), text.dropLast().allSatisfy(\.isASCII), let count = Int(text.dropLast()), count > 0,
            !text.hasPrefix("+")
        else { return nil }
        let (seconds, overflow) = count.multipliedReportingOverflow(by: unit.seconds)
        return overflow ? nil : seconds
    }

    private static func words(_ policy: RecoveryPointPolicy) -> String {
        policy.tiers.map { "\($0.everySeconds == 0 ? "all" : words($0.everySeconds)):\($0.forSeconds == 86_400 ? "24h" : words($0.forSeconds))" }.joined(separator: ",")
    }

    /// In the largest unit that divides it; weeks are seldom meant.
    private static func words(_ seconds: Int) -> String {
        for unit in units where unit.letter != "w" && seconds % unit.seconds == 0 { return "\(seconds / unit.seconds)\(unit.letter)" }
        return "\(seconds)s"
    }
}
