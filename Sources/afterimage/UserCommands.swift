import Appliance
import ArgumentParser
import Foundation

struct UserCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "user", abstract: "People who may log in.",
        discussion: """
            At its first start the appliance makes the user administrator; its password is in STATE/administrator-password until it is changed. Passwords have 12 to 200 \
            characters. They are asked for on the terminal, or taken from a file (--password-file; its first line).
            """,
        subcommands: [Create.self, List.self, SetPassword.self, Delete.self])

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Create a user.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var password: PasswordOption
        @Argument(help: "The user's name.") var name: String
        @Option(help: "viewer, operator or administrator (see afterimage token create --help).") var role: Role

        func run(_ client: APIClient) async throws {
            let user: UserView = try await client.post("/v1/users", CreateUser(name: name, role: role, password: try password.new(of: name)))
            try show(user) { ["user \(user.name) (\(user.role.rawValue))"] }
        }
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the users.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let users: [UserView] = try await client.get("/v1/users")
            try show(users) {
                Terminal.table(["NAME", "ROLE", "CREATED", "PASSWORD SET"], users.map { [$0.name, $0.role.rawValue, Words.timeToSecond($0.created), Words.timeToSecond($0.passwordSet)] })
            }
        }
    }

    struct SetPassword: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Set a user's password; its sessions end.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var password: PasswordOption
        @Argument(help: "The user's name.") var name: String

        func run(_ client: APIClient) async throws {
            try await client.putNoContent("/v1/users/\(APIClient.segment(name))/password", Appliance.SetPassword(password: try password.new(of: name)))
            say("the password of \(name) is set; its sessions have ended")
        }
    }

    struct Delete: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Delete a user; its sessions end.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The user's name.") var name: String

        func run(_ client: APIClient) async throws {
            try await client.deleteNoContent("/v1/users/\(APIClient.segment(name))")
            say("user \(name) is deleted")
        }
    }
}

struct PasswordOption: ParsableArguments {
    @Option(help: ArgumentHelp("The file whose first line is the password.", valueName: "file")) var passwordFile: String?

    func known(of name: String) throws -> String { try fromFile() ?? ask("password of \(name)") }

    /// Typed twice.
    func new(of name: String) throws -> String {
        if let password = try fromFile() { return password }
        let password = try ask("new password of \(name)")
        guard try ask("once more") == password else {
            Terminal.error("these are two different passwords: nothing was done")
            throw Exit.usage
        }
        return password
    }

    private func fromFile() throws -> String? {
        guard let passwordFile else { return nil }
        guard let data = FileManager.default.contents(atPath: passwordFile) else {
            Terminal.error("cannot read the password file \(passwordFile)")
            throw Exit.usage
        }
        return String(decoding: data.prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self)
    }

    /// Not shown while it is typed.
    private func ask(_ question: String) throws -> String {
        guard isatty(STDIN_FILENO) == 1 else {
            Terminal.error("there is no terminal to ask for the password: give --password-file")
            throw Exit.usage
        }
        var shown = termios()
        tcgetattr(STDIN_FILENO, &shown)
        var hidden = shown
        hidden.c_lflag &= ~tcflag_t(ECHO)
        tcsetattr(STDIN_FILENO, TCSAFLUSH, &hidden)
        defer {
            tcsetattr(STDIN_FILENO, TCSAFLUSH, &shown)
            FileHandle.standardError.write(Data("\n".utf8))
        }
        FileHandle.standardError.write(Data("\(question): ".utf8))
        return readLine() ?? ""
    }
}

struct LoginCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "login", abstract: "Log in to an appliance; writes a profile.",
        discussion: """
            The profile is good for twelve hours; logging in again replaces it. Other commands find it by --profile FILE or $AFTERIMAGE_PROFILE. The appliance shows who it is by its \
            CA's fingerprint (its log has it): compare it, or give it with --ca-fingerprint.
            """)
    @Argument(help: "The appliance's API, for example https://10.0.0.2:8443.") var url: String
    @Option(help: "The user's name.") var user: String
    @OptionGroup var password: PasswordOption
    @Option(help: ArgumentHelp("The fingerprint that the CA must have (SHA-256, hexadecimal); else it is shown and asked for.", valueName: "hex")) var caFingerprint: String?
    @Option(help: ArgumentHelp("The profile to write. (default: $AFTERIMAGE_PROFILE, else ~/.config/afterimage/client.json)", valueName: "file")) var profile: String?

    private var file: String {
        profile ?? ProcessInfo.processInfo.environment["AFTERIMAGE_PROFILE"] ?? NSHomeDirectory() + "/.config/afterimage/client.json"
    }

    func validate() throws {
        guard let components = URLComponents(string: url), components.scheme == "https", components.host?.isEmpty == false, ["", "/"].contains(components.path) else {
            throw ValidationError("\(url) is not an appliance's API: write https://HOST:PORT")
        }
    }

    func run() async throws {
        let address = url.hasSuffix("/") ? String(url.dropLast()) : url
        do {
            let ca = try await APIClient.authority(of: address)
            guard agrees(to: ca.fingerprint) else {
                Terminal.error("the CA of \(address) has the fingerprint \(ca.fingerprint): not logged in")
                throw Exit.forbidden
            }
            try FileManager.default.createDirectory(at: URL(fileURLWithPath: file).deletingLastPathComponent(), withIntermediateDirectories: true)
            var written = ClientProfile(url: address, caFile: URL(fileURLWithPath: file).path + ".ca.pem", token: "")
            try Data(ca.certificate.utf8).write(to: URL(fileURLWithPath: written.caFile))
            let request = CreateSession(user: user, password: try password.known(of: user))
            let created: CreatedSession = try await APIClient.with(written) { try await $0.post("/v1/sessions", request) }
            written.token = created.secret
            try written.write(to: file)
            print("logged in as \(user) (\(created.session.role.rawValue)) until \(created.session.expires.map(Words.timeToSecond) ?? "it ends"); profile: \(file)")
        } catch APIClient.Failure.problem(let problem) {
            Terminal.error(problem.detail)
            throw problem.status == 401 ? Exit.forbidden : Exit.failed
        } catch APIClient.Failure.unreachable(let why) {
            Terminal.error(why)
            throw Exit.unreachable
        }
    }

    private func agrees(to fingerprint: String) -> Bool {
        if let caFingerprint { return caFingerprint.replacingOccurrences(of: ":", with: "").lowercased() == fingerprint }
        guard isatty(STDIN_FILENO) == 1 else { return false }
        FileHandle.standardError.write(Data("The CA of \(url) has the fingerprint\n  \(fingerprint)\nIs that the appliance's? (yes/no) ".utf8))
        return readLine() == "yes"
    }
}
