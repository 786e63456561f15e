/// What went wrong with keys and certificates; the text says on what file or field and what to do.
public struct PKIError: Error, Sendable, Hashable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}
