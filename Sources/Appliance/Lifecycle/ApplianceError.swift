/// What can go wrong at the appliance, as its API tells it: the case decides the HTTP status and the CLI's exit code, the text is a full
/// sentence for the operator.
public enum ApplianceError: Error, Sendable, Equatable, CustomStringConvertible {
    /// 422: the request makes no sense, whatever the state.
    case invalid(String)
    /// 404
    case notFound(String)
    /// 409: the state table, or what is there already, says no.
    case refused(String)
    /// 412: it is not any more as the one who asks has seen it.
    case changed(String)
    /// 401
    case unauthorized(String)
    /// 403: known, but not with this role.
    case forbidden(String)
    /// 429: not again for so many seconds.
    case tooMany(String, seconds: Int)
    /// 500: the appliance's own trouble (disk, catalogue, QEMU).
    case failed(String)
    case catalogue(String)

    public var description: String {
        switch self {
        case .invalid(let s), .notFound(let s), .refused(let s), .changed(let s), .unauthorized(let s), .forbidden(let s), .failed(let s), .catalogue(let s): s
        case .tooMany(let s, let seconds): "\(s) Try again in \(seconds) s."
        }
    }
}
