import Foundation
import Testing

@testable import Appliance

@Suite("Bridges of recovery machines")
struct BridgeSettingsTests {
    @Test("addresses with their networks", arguments: [("10.80.0.1/24", true), ("10.80.0.1", false), ("10.80.0.256/24", false), ("10.80.0.+1/24", false), ("10.80.0.1/33", false), ("10.80.1/24", false)])
    func interfaces(text: String, isGood: Bool) { #expect(IPv4Interface(text)?.description == (isGood ? text : nil)) }

    @Test("a network's bounds")
    func bounds() throws {
        let subnet = try #require(IPv4Interface("10.80.7.130/25"))
        #expect(IPv4Interface.text(subnet.network) == "10.80.7.128" && IPv4Interface.text(subnet.broadcast) == "10.80.7.255")
        let inside = try #require(IPv4Interface.address("10.80.7.129")), outside = try #require(IPv4Interface.address("10.80.7.127"))
        #expect(subnet.contains(inside) && !subnet.contains(outside))
        #expect(!subnet.isHost(subnet.network) && !subnet.isHost(subnet.broadcast))
    }

    @Test("what no bridge can be is refused before anything is made")
    func checks() throws {
        try BridgeSettings(name: "br0").check()
        try BridgeSettings(subnet: #require(IPv4Interface("10.80.0.1/24"))).check()
        #expect(throws: ApplianceError.self) { try BridgeSettings().check() }
        #expect(throws: ApplianceError.self) { try BridgeSettings(name: "a,script=x").check() }
        #expect(throws: ApplianceError.self) { try BridgeSettings(name: "a-name-of-17-byte").check() }
        #expect(throws: ApplianceError.self) { try BridgeSettings(subnet: #require(IPv4Interface("10.80.0.0/24"))).check() }
        #expect(throws: ApplianceError.self) { try BridgeSettings(subnet: #require(IPv4Interface("10.80.0.1/30"))).check() }
    }

    @Test("machines that the catalogue had before there were bridges are read")
    func older() throws {
        let text = #"{"cpus":1,"memoryMiB":64,"network":"user","forwards":[{"hostPort":1,"guestPort":2}],"bootCheck":{"serial":{"_0":"ok"}},"bootSecondsMax":9}"#
        let settings = try JSONDecoder().decode(MachineSettings.self, from: Data(text.utf8))
        #expect(settings.bridge == nil && settings.bootCheck == .serial("ok"))
        var bridged = settings
        bridged.bridge = BridgeSettings(subnet: try #require(IPv4Interface("10.80.0.1/24")))
        #expect(try JSONDecoder().decode(MachineSettings.self, from: JSONEncoder().encode(bridged)) == bridged)
    }
}
