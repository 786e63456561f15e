import Foundation
import GRDB

/// The catalogue as a support bundle has it: only what is named here, so that a table that comes later is not given away unawares.
enum SupportCatalogue {
    private struct Table {
        var name: String
        /// Newest rows; nil: all.
        var limit: Int?
        /// Beside those whose names say what they are.
        var without: Set<String> = []
    }

    private static let tables = [
        Table(name: "site"), Table(name: "sitePair"), Table(name: "network"), Table(name: "server"), Table(name: "instance"), Table(name: "pointExport"), Table(name: "pointMount"),
        Table(name: "task", limit: 2000), Table(name: "event", limit: 5000), Table(name: "alert", limit: 1000), Table(name: "alertDelivery", limit: 1000),
        // Where alerts go is often a secret itself; a plan's scripts have arguments.
        Table(name: "alertChannel", without: ["target"]), Table(name: "token"), Table(name: "plan", without: ["groups"]), Table(name: "planRun", limit: 500),
        Table(name: "planStep", limit: 5000, without: ["work"]),
    ]
    private static let taskCountMax = 500
    private static let lineCountMax = 20_000

    /// File names and JSON, one object per row, newest first where there is a limit.
    static func files(_ db: Database) throws -> [(name: String, text: String)] {
        try tables.map { table in
            let columns = try db.columns(in: table.name).map(\.name).filter { !SupportSecrets.isSecret(column: $0) && !table.without.contains($0) }
            let names = columns.map { "\"\($0)\"" }.joined(separator: ", ")
            let rows = try Row.fetchAll(db, sql: "SELECT \(names) FROM \"\(table.name)\"" + (table.limit.map { " ORDER BY rowid DESC LIMIT \($0)" } ?? ""))
            let objects = rows.map { row -> [String: Any] in
                var object = Dictionary(uniqueKeysWithValues: columns.map { ($0, value(row[$0])) })
                // What is said of plans has their scripts' arguments.
                if table.name == "event", let what = object["what"] as? String, what.hasSuffix("recovery plan"), what != "Run recovery plan" {
                    for key in ["before", "after", "detail"] { object[key] = SupportSecrets.placeholder }
                }
                return object
            }
            let data = try JSONSerialization.data(withJSONObject: objects, options: [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes])
            return ("catalogue/\(table.name).json", String(decoding: data, as: UTF8.self))
        }
    }

    private static func value(_ value: DatabaseValue) -> Any {
        switch value.storage {
        case .null: NSNull()
        case .int64(let number): number
        case .double(let number): number
        case .string(let text): text
        case .blob(let data): "\(data.count) bytes"
        }
    }

    /// The newest tasks with their logs.
    static func tasks(_ db: Database) throws -> String {
        var lines: [String] = [], logCount = 0
        for task in try TaskRecord.order(Column("id").desc).limit(taskCountMax).fetchAll(db) where logCount < lineCountMax {
            let log = try TaskLogRecord.filter(Column("task") == task.id).order(Column("id")).limit(lineCountMax - logCount).fetchAll(db)
            logCount += log.count
            lines.append("task \(task.id ?? 0): \(task.operation.rawValue) of \(task.serverName ?? "-"), \(task.status.rawValue), by \(task.who), \(APIJSON.text(task.created))")
            lines += log.map { "  \(APIJSON.text($0.time))  \($0.line)" }
        }
        return lines.joined(separator: "\n") + "\n"
    }
}
