import Appliance
import ArgumentParser

struct CatalogueCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "catalogue", abstract: "What the appliance remembers: sites, servers, tasks, events.", subcommands: [BackUp.self])

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
}
