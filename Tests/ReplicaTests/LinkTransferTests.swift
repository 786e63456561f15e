import Foundation
import NIOCore
import Testing

@testable import Replica

@Suite("Throttle windows and compression")
struct LinkTransferTests {
    @Test("a window holds its minutes, on its days, also over midnight and over the week's end")
    func windows() {
        let office = ThrottleWindow(startMinute: 480, endMinute: 1080, days: [1, 2, 3, 4, 5], bytesPerSecond: 5)
        #expect(office.holds(DayTime(weekday: 1, minute: 480)) && office.holds(DayTime(weekday: 5, minute: 1079)))
        #expect(!office.holds(DayTime(weekday: 1, minute: 479)) && !office.holds(DayTime(weekday: 1, minute: 1080)) && !office.holds(DayTime(weekday: 6, minute: 600)))
        let night = ThrottleWindow(startMinute: 1320, endMinute: 360, days: [7], bytesPerSecond: 0)
        #expect(night.holds(DayTime(weekday: 7, minute: 1320)) && night.holds(DayTime(weekday: 1, minute: 359)))
        #expect(!night.holds(DayTime(weekday: 1, minute: 1320)) && !night.holds(DayTime(weekday: 7, minute: 359)) && !night.holds(DayTime(weekday: 1, minute: 360)))
        let windows = [office, ThrottleWindow(startMinute: 0, endMinute: 1440, bytesPerSecond: 7)]
        #expect(ThrottleWindow.bytesPerSecond(windows, otherwise: 9, at: DayTime(weekday: 1, minute: 600)) == 5, "the first counts")
        #expect(ThrottleWindow.bytesPerSecond(windows, otherwise: 9, at: DayTime(weekday: 7, minute: 600)) == 7)
        #expect(ThrottleWindow.bytesPerSecond([office], otherwise: 9, at: DayTime(weekday: 7, minute: 600)) == 9)
        #expect(ThrottleWindow.bytesPerSecond(nil, otherwise: 9, at: DayTime.now()) == 9)
        #expect((0..<1440).contains(DayTime.now().minute) && (1...7).contains(DayTime.now().weekday))
        for bad in [ThrottleWindow(startMinute: 5, endMinute: 5, bytesPerSecond: 1), .init(startMinute: 1440, endMinute: 5, bytesPerSecond: 1), .init(startMinute: -1, endMinute: 5, bytesPerSecond: 1),
            .init(startMinute: 0, endMinute: 1441, bytesPerSecond: 1), .init(startMinute: 0, endMinute: 5, days: [], bytesPerSecond: 1), .init(startMinute: 0, endMinute: 5, days: [0], bytesPerSecond: 1)] {
            #expect(!bad.isValid, "\(bad)")
        }
    }

    @Test("a throttle that is changed gives the new rate from then on")
    func change() {
        var throttle = Throttle(bytesPerSecond: 1000)
        var now: Int64 = 0
        func send(until end: Int64) -> Int {
            var sent = 0
            while now < end {
                let delay = throttle.delay(now: now)
                if delay > 0 { now += delay } else {
                    throttle.spend(1000)
                    sent += 1000
                    if throttle.bytesPerSecond == 0 { now += 1_000_000 }
                }
            }
            return sent
        }
        #expect((9_000...12_000).contains(send(until: 10_000_000_000)))
        throttle.set(bytesPerSecond: 1_000_000)
        #expect((9_000_000...10_600_000).contains(send(until: 20_000_000_000)))
        throttle.set(bytesPerSecond: 0)
        // What is sent without a limit is no debt.
        for _ in 0..<100 {
            #expect(throttle.delay(now: now) == 0)
            throttle.spend(1 << 20)
        }
        throttle.set(bytesPerSecond: 1_000_000)
        throttle.spend(1 << 20)
        throttle.set(bytesPerSecond: 1000)
        #expect((9_000...13_000).contains(send(until: 30_000_000_000)))
    }

    @Test("always packs what shrinks without waiting for a verdict; off packs nothing; neither packs what does not shrink")
    func compression() {
        let allocator = ByteBufferAllocator()
        let zeroes = allocator.buffer(bytes: [UInt8](repeating: 7, count: 100_000))
        var generator = SystemRandomNumberGenerator()
        let noise = allocator.buffer(bytes: (0..<100_000).map { _ in UInt8.random(in: 0...255, using: &generator) })
        var always = Compression(allocator: allocator, choice: .always), off = Compression(allocator: allocator, choice: .off), auto = Compression(allocator: allocator)
        #expect(always.pack(zeroes) != nil && always.pack(noise) == nil && off.pack(zeroes) == nil && auto.pack(zeroes) == nil)
        // A window in which the line was slow.
        auto.account(begin: 0, end: 1, wireBytes: 0)
        auto.account(begin: 200_000_000, end: 200_000_001, wireBytes: 1000)
        off.account(begin: 200_000_000, end: 200_000_001, wireBytes: 1000)
        #expect(auto.pack(zeroes) != nil && off.pack(zeroes) == nil)
    }

    @Test("agents and appliances of before and after understand each other's orders and statuses")
    func versions() throws {
        let old = #"{"group":"g","generation":1,"disks":["vda"],"epochMilliseconds":1000,"throttleBytesPerSecond":5,"automaticRestart":true}"#
        let order = try JSONDecoder().decode(ReplicationOrder.self, from: Data(old.utf8))
        #expect(order.throttleWindows == nil && order.compression == nil && order.linkHost == nil)
        var new = order
        new.compression = .always
        new.throttleWindows = [ThrottleWindow(startMinute: 1, endMinute: 2, bytesPerSecond: 3)]
        #expect(try JSONDecoder().decode(ReplicationOrder.self, from: JSONEncoder().encode(new)) == new)
        /// What an older agent knows of it.
        struct Older: Decodable { var group: String, throttleBytesPerSecond: UInt64 }
        #expect(try JSONDecoder().decode(Older.self, from: JSONEncoder().encode(new)).throttleBytesPerSecond == 5)
        #expect(new.isSameStream(as: order) && order.isSameStream(as: new))
        new.disks = ["vdb"]
        #expect(!new.isSameStream(as: order))
        var status = AgentStatus()
        status.throttleBytesPerSecond = 4
        #expect(try JSONDecoder().decode(AgentStatus.self, from: JSONEncoder().encode(status)).throttleBytesPerSecond == 4)
    }
}
