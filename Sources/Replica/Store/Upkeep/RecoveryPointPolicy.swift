/// Which recovery points are kept: "one every D for the last T", several times. A point stays as long as one of the tiers wants it.
///
/// A tier cuts time into slots of D that begin at whole multiples of D since 1970, and wants the first point of each slot. Which point
/// that is never changes when later ones come, so that
///
/// - a point that a tier wants is wanted from its first moment to the end of the tier: coarse tiers find theirs still there;
/// - it does not matter how often, or when, anybody looks: the survivors are the same.
///
/// Age is counted by the store's own clock (`receivedTimeNanoseconds`), since a source's may be wrong, and from the newest point on:
/// while nothing arrives, after a disaster say, history stays as it is. Points of the future have age 0.
public struct RecoveryPointPolicy: Codable, Sendable, Hashable {
    public struct Tier: Codable, Sendable, Hashable {
        /// One point in so many seconds; 0 = every point.
        public var everySeconds: Int
        /// For the last so many seconds.
        public var forSeconds: Int
        public init(everySeconds: Int, forSeconds: Int) {
            self.everySeconds = everySeconds
            self.forSeconds = forSeconds
        }
    }

    public var tiers: [Tier]

    public init(tiers: [Tier]) { self.tiers = tiers }

    /// Every point for 10 minutes, one every 10 minutes for an hour, 24 hourly ones, one a day for a week.
    public static let standard = RecoveryPointPolicy(tiers: [
        Tier(everySeconds: 0, forSeconds: 600),
        Tier(everySeconds: 600, forSeconds: 3600),
        Tier(everySeconds: 3600, forSeconds: 86_400),
        Tier(everySeconds: 86_400, forSeconds: 7 * 86_400),
    ])

    public static let tierCountMax = 16
    /// A hundred years.
    static let secondsMax = 100 * 366 * 86_400

    /// Throws `.invalid` when the policy makes no sense.
    public func validated() throws(StoreError) {
        guard (1...Self.tierCountMax).contains(tiers.count) else { throw .invalid("a policy has 1 to \(Self.tierCountMax) tiers, not \(tiers.count)") }
        for tier in tiers {
            guard (1...Self.secondsMax).contains(tier.forSeconds), (0...tier.forSeconds).contains(tier.everySeconds) else {
                throw .invalid("one recovery point every \(tier.everySeconds) s for \(tier.forSeconds) s is no tier of a policy")
            }
        }
    }

    /// The points that no tier wants any more. Never the newest, never held ones, and none that somebody asked for before the longest
    /// tier ends. `points` are in the order in which the store has them, oldest first.
    public func expired(_ points: [RecoveryPoint], nowNanoseconds: UInt64) -> [RecoveryPointID] {
        expired(points, nowNanoseconds: nowNanoseconds, ignoresHolds: false)
    }

    func expired(_ points: [RecoveryPoint], nowNanoseconds: UInt64, ignoresHolds: Bool) -> [RecoveryPointID] {
        guard let newest = points.last else { return [] }
        let reference = min(nowNanoseconds, newest.receivedTimeNanoseconds)
        func ageNanoseconds(_ point: RecoveryPoint) -> UInt64 { reference > point.receivedTimeNanoseconds ? reference - point.receivedTimeNanoseconds : 0 }
        func nanoseconds(_ seconds: Int) -> UInt64 { UInt64(max(0, min(seconds, Self.secondsMax))) * 1_000_000_000 }
        let longest = tiers.map { nanoseconds($0.forSeconds) }.max() ?? 0

        var isWanted = [Bool](repeating: false, count: points.count)
        for tier in tiers {
            let span = nanoseconds(tier.forSeconds)
            let slotLength = nanoseconds(tier.everySeconds)
            var taken: Set<UInt64> = []
            for (index, point) in points.enumerated() {
                // The slot is taken also by a point that is too old by now: its successor was not wanted and does not become so.
                let isFirst = slotLength == 0 || taken.insert(point.receivedTimeNanoseconds / slotLength).inserted
                if isFirst, ageNanoseconds(point) <= span { isWanted[index] = true }
            }
        }
        var gone: [RecoveryPointID] = []
        for (index, point) in points.enumerated().dropLast() where !isWanted[index] {
            if point.hold != nil, !ignoresHolds { continue }
            if point.isOnDemand, ageNanoseconds(point) <= longest { continue }
            gone.append(point.id)
        }
        return gone
    }
}
