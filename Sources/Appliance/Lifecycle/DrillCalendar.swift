import Foundation

/// Every so many days at a time of the day, in the appliance's local time: a day that is 23 or 25 hours long moves nothing.
struct DrillCalendar: Sendable {
    static let everyDaysRange = 1...366
    var everyDays: Int
    var minuteOfDay: Int
    var calendar = Calendar.current

    /// The first one after `now` for a new schedule: today or tomorrow.
    func first(after now: Date) -> Date {
        let today = at(day: now)
        return today > now ? today : at(day: day(1, after: now))
    }

    /// The first one after `now` that follows `last`. Those that were missed between are one: the one that is being made up.
    func next(after last: Date, now: Date) -> Date {
        var day = last
        repeat { day = self.day(everyDays, after: day) } while at(day: day) <= now
        return at(day: day)
    }

    private func day(_ count: Int, after date: Date) -> Date { calendar.date(byAdding: .day, value: count, to: date) ?? date.addingTimeInterval(Double(count) * 86_400) }

    /// Where the clocks jump over that time, the first moment after it.
    private func at(day: Date) -> Date {
        let start = calendar.startOfDay(for: day)
        return calendar.date(bySettingHour: minuteOfDay / 60, minute: minuteOfDay % 60, second: 0, of: start) ?? start.addingTimeInterval(Double(minuteOfDay) * 60)
    }

    /// `HH:MM`
    static func minute(_ text: String) throws(ApplianceError) -> Int {
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        guard parts.count == 2, parts.allSatisfy({ $0.utf8.count == 2 && $0.utf8.allSatisfy((UInt8(ascii: "0")...UInt8(ascii: "9")).contains) }), let hour = Int(parts[0]), let minute = Int(parts[1]), (0...23).contains(hour), (0...59).contains(minute) else {
            throw .invalid("the time of the day is HH:MM, 00:00 to 23:59, not \(text)")
        }
        return hour * 60 + minute
    }

    static func text(_ minute: Int) -> String { String(format: "%02d:%02d", minute / 60, minute % 60) }
}
