import Testing

@testable import afterimage

@Suite("Tables")
struct TableTests {
    @Test("the widest columns are cut where a table does not fit its terminal, and nowhere else")
    func cut() {
        let rows = [["12345", "2026-11-30 03:00:00", "shop", "Clear Test Failover Environment", "succeeded", ""], ["12346", "2026-11-30 03:00:01", "a-server-with-a-long-name", "Failover", "failed", "cannot start the machine: there is no memory left on the host"]]
        let headings = ["ID", "CREATED", "SERVER", "OPERATION", "STATUS", "ERROR"]
        let lines = Terminal.table(headings, rows, columns: 80)
        #expect(lines.allSatisfy { $0.count <= 80 }, "\(lines)")
        #expect(lines[1].contains("…") && lines[1].contains("succeeded") && lines.joined(separator: " ").contains("no memory left"))
        #expect(!Terminal.table(headings, rows, columns: nil).joined().contains("…") && !Terminal.table(headings, rows, columns: 200).joined().contains("…"))
        let servers = [["shop", "pair", "Replication Interrupted", "Clear Test Failover Environment", "connected", "123456"]]
        let fitted = Terminal.table(["NAME", "PAIR", "STATE", "DRILL", "AGENT", "POINTS"], servers, columns: 80)
        #expect(fitted.count == 2 && fitted.allSatisfy { $0.count <= 80 } && fitted[1].hasSuffix("123456"), "\(fitted)")
        // However narrow, something of every column is there.
        #expect(Terminal.table(headings, rows, columns: 20)[1].hasPrefix("12345  2026-11…  "))
    }
}
