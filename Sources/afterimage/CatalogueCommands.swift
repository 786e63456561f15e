import Appliance
import ArgumentParser
import Foundation

struct CatalogueCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "catalogue", abstract: "What the appliance remembers: sites, servers, tasks, events.", subcommands: [BackUp.self, Import.self])

    struct BackUp: ClientCommand {
        static let configuration = CommandConfiguration(
            commandName: "backup",
            abstract: "Back up the catalogue into a new file on the appliance's host, while it is in use.",
            discussion: """
                To go back to it: stop the appliance, move STATE/catalogue.sqlite, -wal and -shm away, put the file in its place, start the appliance. \
                The keys of its CA (STATE/ca) are not in it: keep a copy of those too, in a safe place. Recovery points are in the store.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Absolute path of the file; it must not exist.") var file: String

        func run(_ client: APIClient) async throws {
            try await client.postNoContent("/v1/catalogue/backup", BackUpCatalogue(path: file))
            say("the catalogue is backed up to \(file)")
        }
    }
    struct Import: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Take a pair and its servers from the copy that an agent keeps, when the catalogue and its backups are lost.",
            discussion: """
                Every agent keeps what its appliance knows of the pair: on its host, afterimage agent configuration prints it. Start the appliance with the old store \
                and a new --state, and import that. Machines can be started from the recovery points at once; each agent has to be enrolled again (afterimage server \
                token NAME). Recovery machines, tokens, alert channels, tasks and the audit log are not in the copy.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The copy, on this host.") var file: String

        func run(_ client: APIClient) async throws {
            let copy: ConfigurationCopy
            do { copy = try APIJSON.decoder().decode(ConfigurationCopy.self, from: Data(contentsOf: URL(fileURLWithPath: file))) } catch {
                Terminal.error("\(file) is not a copy of an appliance's configuration: \(error)")
                throw Exit.failed
            }
            let names: [String] = try await client.post("/v1/catalogue/import", copy)
            try show(names) { names.map { "server \($0) is imported; let its agent in: afterimage server token \($0)" } }
        }
    }
}
