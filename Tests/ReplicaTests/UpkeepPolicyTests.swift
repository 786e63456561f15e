import BlockTap
import Testing

@testable import Replica

private let second: UInt64 = 1_000_000_000
/// Somewhere in 2023, not on a boundary of anything.
private let origin: UInt64 = 1_700_000_123 * second

private func point(_ number: Int, at time: UInt64) -> RecoveryPoint {
    RecoveryPoint(
        id: RecoveryPointID("rp-\(number)"), group: webGroup, epoch: EpochNumber(UInt64(number)), instance: "a", cutTimeNanoseconds: 0, consistency: .crash,
        receivedTimeNanoseconds: time, dataBytes: 0)
}

private func expire(_ points: inout [RecoveryPoint], _ policy: RecoveryPointPolicy, now: UInt64) {
    let gone = Set(policy.expired(points, nowNanoseconds: now))
    points.removeAll { gone.contains($0.id) }
}

@Suite struct UpkeepPolicyTests {
    let standard = RecoveryPointPolicy.standard

    @Test func afterADayThereAre24HourlyPointsAndTheOthersOfThePolicy() {
        var points: [RecoveryPoint] = []
        for number in 0...(26 * 360) {
            let now = origin + UInt64(number) * 10 * second
            points.append(point(number, at: now))
            expire(&points, standard, now: now)
        }
        let now = points.last!.receivedTimeNanoseconds
        let hours = Set(points.lazy.filter { now - $0.receivedTimeNanoseconds <= 86_400 * second }.map { $0.receivedTimeNanoseconds / (3600 * second) })
        #expect(hours.count >= 24)
        #expect(points.filter { now - $0.receivedTimeNanoseconds <= 600 * second }.count == 61)
        #expect(points.filter { now - $0.receivedTimeNanoseconds <= 3600 * second && $0.receivedTimeNanoseconds % (600 * second) < 10 * second }.count == 6)
        #expect(points.count <= 61 + 6 + 24 + 2)
    }

    /// However often somebody looks, and whenever: what is left in the end is the same.
    @Test(arguments: 1...40)
    func itDoesNotMatterWhenAnybodyLooks(seed: Int) {
        var random = SeededRandom(seed: UInt64(seed))
        var often: [RecoveryPoint] = []
        var seldom: [RecoveryPoint] = []
        var all: [RecoveryPoint] = []
        var now = origin
        for number in 0..<3000 {
            now += UInt64(random.below(20) == 0 ? random.below(30_000) : random.below(600)) * second
            let new = point(number, at: now)
            often.append(new)
            seldom.append(new)
            all.append(new)
            expire(&often, standard, now: now)
            if random.below(100) == 0 { expire(&seldom, standard, now: now) }
        }
        expire(&seldom, standard, now: now)
        expire(&all, standard, now: now)
        #expect(often == seldom && often == all)
    }

    @Test(arguments: 1...20)
    func aKeptPointStaysUntilItsTierEndsAndHourlyOnesAreAnHourApart(seed: Int) {
        var random = SeededRandom(seed: UInt64(seed))
        var points: [RecoveryPoint] = []
        var now = origin
        var ends: [RecoveryPointID: UInt64] = [:]
        for number in 0..<4000 {
            now += UInt64(1 + random.below(120)) * second
            points.append(point(number, at: now))
            let before = points
            expire(&points, standard, now: now)
            for gone in Set(before).subtracting(points) {
                let age = now - gone.receivedTimeNanoseconds
                ends[gone.id] = age
                // It goes when one of the tiers ends, within one step of the clock.
                #expect(standard.tiers.contains { age > UInt64($0.forSeconds) * second && age <= UInt64($0.forSeconds + 120) * second }, "\(gone.id) at \(age / second) s")
            }
        }
        let hourly = points.filter { (3600 * second..<86_400 * second).contains(now - $0.receivedTimeNanoseconds) }.map { $0.receivedTimeNanoseconds / (3600 * second) }
        #expect(Set(hourly).count == hourly.count)
        #expect(hourly.last! - hourly.first! == UInt64(hourly.count - 1))
    }

    @Test func heldPointsNewestPointsAndThoseAskedForStay() {
        var points = (0..<2000).map { point($0, at: origin + UInt64($0) * 3600 * second) }
        points[3].hold = "before the upgrade"
        points[5].isOnDemand = true
        let late = points.count - 100
        points[late].isOnDemand = true
        let now = points.last!.receivedTimeNanoseconds
        let gone = standard.expired(points, nowNanoseconds: now)
        #expect(!gone.contains(points[3].id) && gone.contains(points[4].id))
        #expect(gone.contains(points[5].id))
        #expect(!gone.contains(points[late].id) && gone.contains(points[late + 1].id))
        #expect(!gone.contains(points.last!.id))
        #expect(standard.expired([points[0]], nowNanoseconds: .max).isEmpty)
        #expect(standard.expired([], nowNanoseconds: now).isEmpty)
    }

    /// A clock that jumps back makes points of the future: they stay, and nothing that was kept goes because of them.
    @Test(arguments: 1...20)
    func clocksThatJumpBackHarmNothing(seed: Int) {
        var random = SeededRandom(seed: UInt64(seed))
        var points: [RecoveryPoint] = []
        var now = origin
        for number in 0..<2000 {
            now += UInt64(random.below(120)) * second
            if random.below(200) == 0 { now -= UInt64(random.below(7200)) * second }
            points.append(point(number, at: now))
            let before = points
            expire(&points, standard, now: now)
            for gone in Set(before).subtracting(points) { #expect(gone.receivedTimeNanoseconds + 600 * second < now) }
            #expect(points.last == before.last)
        }
        let kept = points
        for back in [0, 1, 3600, 86_400, 100 * 86_400] as [UInt64] { #expect(standard.expired(kept, nowNanoseconds: now - back * second).isEmpty) }
        #expect(standard.expired(kept, nowNanoseconds: 0).isEmpty)
    }

    @Test func whileNothingArrivesHistoryStays() {
        var points = (0..<500).map { point($0, at: origin + UInt64($0) * 60 * second) }
        expire(&points, standard, now: points.last!.receivedTimeNanoseconds)
        #expect(standard.expired(points, nowNanoseconds: origin + 365 * 86_400 * second).isEmpty)
    }

    @Test func policiesThatMakeNoSenseAreRefused() throws {
        try standard.validated()
        for tiers in [[], [.init(everySeconds: 10, forSeconds: 0)], [.init(everySeconds: -1, forSeconds: 5)], [.init(everySeconds: 100, forSeconds: 50)], [.init(everySeconds: 0, forSeconds: .max)]] as [[RecoveryPointPolicy.Tier]] {
            #expect(throws: StoreError.self) { try RecoveryPointPolicy(tiers: tiers).validated() }
        }
    }
}
