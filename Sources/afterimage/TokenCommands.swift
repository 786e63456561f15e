import Appliance
import ArgumentParser
import Foundation

struct TokenCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "token", abstract: "Access tokens: who may ask this appliance for what.", subcommands: [Create.self, List.self, Revoke.self])

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Create an access token.",
            discussion: """
                A viewer sees everything and changes nothing. An operator also protects, drills and fails over the servers that are there. An \
                administrator also decides which servers there are, who may come in, and what is written on the appliance's host.

                The secret is printed, and kept nowhere. With --write-profile it goes into a profile that only its owner can read instead, with the CA's \
                certificate beside it (FILE.ca.pem): give that to --profile or $AFTERIMAGE_PROFILE.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the token; the audit log has it beside what its holder does.") var name: String
        @Option(help: "viewer, operator or administrator.") var role: Role
        @Option(help: ArgumentHelp("How many days it is good for; 0: without end. (default: 90)", valueName: "days")) var days: Int?
        @Option(help: ArgumentHelp("Write a client profile with the secret to this new file.", valueName: "file")) var writeProfile: String?

        func validate() throws {
            guard let file = writeProfile, FileManager.default.fileExists(atPath: file) else { return }
            throw ValidationError("\(file) exists already")
        }

        func run(_ client: APIClient) async throws {
            let created: CreatedToken = try await client.post("/v1/tokens", CreateToken(name: name, role: role, days: days))
            var profile: ClientProfile?
            if let file = writeProfile {
                do {
                    profile = try global.load()
                    // Whoever uses the profile may not be let into the appliance's state.
                    let authority = URL(fileURLWithPath: file).path + ".ca.pem"
                    try Data(contentsOf: URL(fileURLWithPath: profile!.caFile)).write(to: URL(fileURLWithPath: authority))
                    profile!.caFile = authority
                    profile!.token = created.secret
                    try profile!.write(to: file)
                } catch {
                    // Nobody has its secret.
                    try? await client.deleteNoContent("/v1/tokens/\(APIClient.segment(name))")
                    Terminal.error("cannot write \(file): \(error); there is no token \(name)")
                    throw Exit.failed
                }
            }
            if global.json {
                if writeProfile == nil { try Terminal.print(json: created) } else { try Terminal.print(json: created.token) }
                return
            }
            print("token \(created.token.name) (\(created.token.role.rawValue)), good \(created.token.expires.map { "until " + Words.timeToSecond($0) } ?? "without end")")
            if let file = writeProfile, let profile {
                print("profile for \(profile.url): \(file)")
            } else {
                print("  \(created.secret)")
                print("It is shown only now.")
            }
        }
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the access tokens.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let tokens: [TokenView] = try await client.get("/v1/tokens")
            try show(tokens) {
                Terminal.table(
                    ["NAME", "ROLE", "CREATED", "GOOD UNTIL"],
                    tokens.map { [$0.name, $0.role.rawValue, Words.timeToSecond($0.created), ($0.expires.map(Words.timeToSecond) ?? "no end") + ($0.isExpired ? " (expired)" : "")] })
            }
        }
    }

    struct Revoke: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Revoke an access token: its holder is not let in any more.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the token.") var name: String

        func run(_ client: APIClient) async throws {
            try await client.deleteNoContent("/v1/tokens/\(APIClient.segment(name))")
            say("token \(name) is revoked")
        }
    }
}
