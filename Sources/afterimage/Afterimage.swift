import ArgumentParser

@main
struct Afterimage: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "afterimage",
        abstract: "Continuous disaster recovery for Linux disks.",
        discussion: """
            The operator's commands are clients of an appliance's API. They find it through a profile: --profile FILE, \
            $AFTERIMAGE_PROFILE, or \(ClientProfilePath.standard).

            Exit codes: 0 done; 1 the operation failed; 3 not possible in the present state; 4 no such thing; \
            5 the appliance cannot be reached; 6 not let in, or not with this role; 64 wrong usage.
            """,
        version: ProgramVersion.text,
        subcommands: [
            StatusCommand.self, SitePairCommand.self, NetworkCommand.self, ServerCommand.self, ReplicationCommand.self, RecoveryPointCommand.self,
            DrillCommand.self, FailoverCommand.self, PlanCommand.self, MachineCommand.self, ReverseCommand.self, FailbackCommand.self, RegistrationCommand.self,
            TaskCommand.self, EventCommand.self, AlertCommand.self, AlertChannelCommand.self, TokenCommand.self, UserCommand.self, LoginCommand.self, CatalogueCommand.self,
            SupportBundleCommand.self, ApplianceCommand.self, AgentCommand.self,
            TapCommand.self, StoreCommand.self,
        ])
}
