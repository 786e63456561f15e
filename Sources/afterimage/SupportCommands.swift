import Appliance
import ArgumentParser

struct SupportBundleCommand: ClientCommand {
    static let configuration = CommandConfiguration(
        commandName: "support-bundle",
        abstract: "Write what somebody who helps needs to see into a new .tar.gz on this host.",
        discussion: """
            Status, store, catalogue, tasks with their logs, the audit log, the ends of recovery machines' consoles, the appliance's newest log lines, facts of its host. \
            Not in it: data of disks, keys, hashes, tokens, secrets, passwords, where alerts are delivered, arguments of recovery plans' scripts. Names and addresses are in it: look \
            before you hand it on. Needs the role administrator.
            """)
    @OptionGroup var global: GlobalOptions
    @Argument(help: "The file; it must not exist.") var file: String

    func run(_ client: APIClient) async throws {
        try await client.download("/v1/support-bundle", to: file)
        say("the support bundle is \(file)")
    }
}
