import Foundation
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import Logging
import Replica
import Testing

@testable import Appliance

/// The API over a real catalogue, store and CA, asked through its router.
func withAPI(_ setup: TestingSetup = .router, _ body: @Sendable (API, String, any TestClientProtocol) async throws -> Void) async throws {
    let directory = try TemporaryDirectory()
    let logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
    let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
    let store = try ReplicaStore.open(directory: directory.path + "/store", logger: logger)
    let machines = RecoveryHost(
        store: store, qemu: QEMUConfiguration(executable: "/nonexistent"), runtimeDirectory: directory.path, stateDirectory: directory.path, logger: logger)
    let lifecycle = Lifecycle(
        catalogue: catalogue, store: store, machines: machines, exports: PointExporter(store: store, runtimeDirectory: directory.path),
        mounts: PointMounter(store: store, runtimeDirectory: directory.path, logger: logger),
        authority: try CertificateAuthority.create(directory: directory.path + "/ca"),
        settings: LifecycleSettings(apiURL: "https://127.0.0.1:1", linkHost: "127.0.0.1", linkPort: 2, storeDirectory: directory.path), logger: logger)
    let token = try await AccessTokens(catalogue: catalogue).administrator(profilePath: directory.path + "/client.json")
    let api = API(lifecycle: lifecycle, catalogue: catalogue, logger: logger)
    try await Application(router: api.router()).test(setup) { client in try await body(api, token, client) }
    await lifecycle.stop()
    store.close()
    try catalogue.close()
}

/// Whether a value is what a schema says: as much of JSON Schema 2020-12 as the API's document uses.
struct SchemaCheck {
    let components: JSONValue

    init(_ document: JSONValue) { components = document["components"]?["schemas"] ?? .null }

    /// What is wrong, and where; nil when nothing is.
    func mismatch(_ value: JSONValue, _ schema: JSONValue, at path: String = "$") -> String? {
        if let reference = schema["$ref"]?.string {
            guard let target = components[reference.split(separator: "/").last.map(String.init) ?? ""] else { return "\(path): there is no \(reference)" }
            return mismatch(value, target, at: path)
        }
        if case .array(let choices) = schema["anyOf"] ?? schema["oneOf"] {
            let findings = choices.map { mismatch(value, $0, at: path) }
            return findings.contains(nil) ? nil : findings.compactMap { $0 }.joined(separator: " or ")
        }
        if case .array(let values) = schema["enum"], !values.contains(value) { return "\(path): \(value) is none of \(values)" }
        let types: [JSONValue] = if case .array(let list) = schema["type"] { list } else { [schema["type"]].compactMap { $0 } }
        if !types.isEmpty, !types.contains(where: { type in Self.types(of: value).contains(type.string ?? "") }) { return "\(path): \(value) is not \(types)" }
        if let number = value.number {
            if let least = schema["minimum"]?.number, number < least { return "\(path): \(number) is below \(least)" }
            if let most = schema["maximum"]?.number, number > most { return "\(path): \(number) is above \(most)" }
        }
        if case .array(let elements) = value, let items = schema["items"] {
            for (index, element) in elements.enumerated() { if let found = mismatch(element, items, at: "\(path)[\(index)]") { return found } }
        }
        guard case .object(let fields) = value else { return nil }
        if case .array(let required) = schema["required"], let missing = required.compactMap(\.string).first(where: { fields[$0] == nil }) { return "\(path): \(missing) is missing" }
        guard case .object(let known) = schema["properties"] else { return nil }
        for (name, field) in fields {
            // Stricter than the document: the appliance says nothing that is not in it.
            guard let inner = known[name] else { return "\(path): \(name) is not in the document" }
            if let found = mismatch(field, inner, at: "\(path).\(name)") { return found }
        }
        return nil
    }

    private static func types(of value: JSONValue) -> Set<String> {
        switch value {
        case .null: ["null"]
        case .bool: ["boolean"]
        case .number(let number): number == number.rounded() ? ["number", "integer"] : ["number"]
        case .string: ["string"]
        case .array: ["array"]
        case .object: ["object"]
        }
    }
}
