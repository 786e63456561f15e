import Foundation

/// Bodies of the API's requests and answers about people and their sessions.

public struct CreateUser: Sendable, Codable {
    public var name: String
    public var role: Role
    public var password: String
    public init(name: String, role: Role, password: String) {
        self.name = name
        self.role = role
        self.password = password
    }
}

public struct UserView: Sendable, Codable, Hashable {
    public var name: String
    public var role: Role
    public var created: Date
    /// When its password was set.
    public var passwordSet: Date

    init(_ record: UserRecord) { (name, role, created, passwordSet) = (record.name, record.role, record.created, record.changed) }
}

public struct SetPassword: Sendable, Codable {
    public var password: String
    public init(password: String) { self.password = password }
}

/// Of one's own.
public struct ChangePassword: Sendable, Codable {
    public var old: String
    public var password: String
    public init(old: String, password: String) {
        self.old = old
        self.password = password
    }
}

public struct CreateSession: Sendable, Codable {
    public var user: String
    public var password: String
    public init(user: String, password: String) {
        self.user = user
        self.password = password
    }
}

public struct CreatedSession: Sendable, Codable {
    public var session: HolderView
    /// What its holder shows, like a token. It cannot be had again.
    public var secret: String
}

/// Who asks.
public struct HolderView: Sendable, Codable, Hashable {
    /// As the audit log has it.
    public var name: String
    public var role: Role
    public var expires: Date?
    /// Else a token.
    public var isSession: Bool

    init(_ holder: Holder) { (name, role, expires, isSession) = (holder.name, holder.role, holder.expires, holder.session != nil) }
}
