import ArgumentParser
import BlockTap
import Foundation
import Replica
import Testing

@testable import Appliance
@testable import afterimage

@Suite("Command line")
struct CommandLineTests {
    private func parse<C: ParsableCommand>(_ words: String, as type: C.Type) throws -> C {
        try #require(try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init)) as? C)
    }

    @Test("every command of the lifecycle parses", arguments: [
        "status", "status --json", "site-pair create p --type region-to-region --primary a --secondary b", "site-pair list",
        "server add a b c --pair p", "server list", "server show a", "server token a", "server remove a --delete-points --stop-machine --wait",
        "replication start a --wait", "replication stop a", "replication pause a", "replication resume a --wait", "server restart a", "recovery-point list a --json", "recovery-point export a --point latest",
        "recovery-point unexport a --point p1", "recovery-point exports", "recovery-point list a --limit 20",
        "recovery-point export a p1 --to raw --output /x/a.raw --wait", "recovery-point export a --to device --output /dev/sdx --yes /dev/sdx --disk vda",
        "recovery-point mount a p1 /mnt --disk vda --partition 2", "recovery-point unmount /mnt", "recovery-point mounts", "task cancel 7",
        "drill start a --wait --network none", "drill start a --network bridge --bridge br0", "drill start a --network bridge --bridge-subnet 10.80.0.1/24 --no-dhcp", "drill clear a --wait",
        "machine hydrate a --wait", "machine hydrate a --drill", "machine promote a --to raw --output /x/a.raw --stop --stop-timeout 5", "machine promote a --to device --output /dev/sdx --yes /dev/sdx --disk vda",
        "appliance --no-hydrate",
        "drill start a --wait --network none", "drill start a --network bridge --bridge br0", "drill clear a --graceful", "failover start a --firmware uefi --disk-bus sata --disk-cache writethrough --nic e1000e --on-end restart --allow-overcommit",
        "drill start a --boot-check agent --boot-check tcp:22 --ip 10.80.0.20/24 --gateway 10.80.0.1 --host-script /x --script-timeout 60", "failover start a --ip keep --script /x --forward 192.0.2.7:80:8080",
        "machine console a --drill --lines 5", "machine vnc a --json", "machine stop a --wait", "task screenshot 7 /x.png", "appliance --ovmf /x --boots-at-once 3", "drill start a --network bridge --bridge-subnet 10.80.0.1/24 --no-dhcp", "drill clear a --wait",
        "drill schedule set a --every 2w --at 03:00 --boot-check serial:READY", "drill schedule list", "drill schedule delete a", "drill report list --server a", "drill report show 7",
        "failover start a --graceful --yes a --preview", "server remove a --preview", "failover change-recovery-point a --point p --yes a",
        "alert list --all", "alert-channel list", "alert-channel create c --webhook https://h/x --secret-file /s --severity critical", "alert-channel test c", "alert-channel delete c",
        "alert-channel create c --mail-server smtp://h --mail-from a@b --mail-to c@d --mail-user u --mail-password-file /p", "server set-alerts a --rpo-target 60s --drill-every 0s",
        "failover start a --point p1 --boot-check serial:READY --boot-timeout 30", "failover change-recovery-point a --point p0", "failover start-machine a --wait", "failover commit a", "failover commit a --yes a", "failover commit a --preview --json",
        "server set-policy a all:10m,1h:24h", "replication start a --policy keep-all", "replication start a --consistent-every 0s", "recovery-point create a --note why --wait", "recovery-point hold a p1 --name n",
        "recovery-point release a p1 --yes n", "recovery-point delete a p1 --yes p1", "appliance --upkeep-rate 8MiB --tighten-when-low --scrub-rate 0 --scrub-pause 7d",
        "token create t --role operator --days 30 --write-profile /x/y.json", "token list --json", "token revoke t", "user create u --role viewer --password-file /p", "user list --json", "user set-password u", "user delete u", "login https://h:8443 --user u --ca-fingerprint ab --password-file /p --profile /x/y.json", "catalogue backup /x/c.sqlite", "catalogue import /x/c.json", "agent configuration --state /x", "task list --server a --limit 5", "task show 12 --wait", "event list", "event follow --json", "appliance --state /s --store /t --listen [::1]:0 --accel kvm",
        "agent run --disk vda=/dev/loop0 --disk vdb=/dev/loop1", "agent enroll --token T", "agent rescue --disk vda=/dev/loop0 --state /x",
        "reverse register a", "reverse start a --original-machine --confirm S1 --confirm S2 --discard-original --throttle 10MiB --wait", "reverse start a --preview", "reverse stop a", "reverse register a --appliance T", "reverse start a --to-appliance --yes a --wait",
        "failback start a --forced --yes a --wait", "failback start a --preview", "failback cancel a", "registration a",
    ])
    func parses(words: String) throws {
        _ = try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init))
    }

    @Test("wrong usage is exit code 64", arguments: [
        "server add a", "replication start", "replication start a --throttle fast", "drill start a --network Moon", "drill start a --bridge-subnet 10.80.0/24", "drill start a --bridge br0 --bridge-subnet 10.80.0.1/24", "drill start a --forward 1:2:3", "drill start a --forward moon:1:2", "drill start a --firmware coreboot", "drill start a --script a --host-script /b", "drill start a --host-script b", "appliance --boots-at-once 0", "task screenshot 7",
        "alert-channel create c", "alert-channel create c --webhook https://h/ --mail-to a@b", "alert-channel create c --mail-server smtp://h", "server set-alerts a --rpo-target soon",
        "failover change-recovery-point a", "appliance --listen nowhere", "agent run", "agent run --disk vda", "agent run --disk vda=/dev/x --read-share 0", "agent run --disk vda=/dev/x --patience -1", "agent rescue", "agent rescue --disk vda", "reverse start", "failback start a --point p", "task show twelve", "fly",
        "recovery-point export a p1 --to raw", "recovery-point export a p1 --to raw --output a.raw", "recovery-point export a p1 --output /x",
        "recovery-point export a p1 --to tape --output /x", "recovery-point export a p1 --point p1", "recovery-point mount a p1 mnt", "recovery-point list a --limit 0",
        "user create u", "login https://h", "login http://h:1 --user u", "token create t", "token create t --role king", "server set-policy a", "server set-policy a all", "server set-policy a 2h:1h", "replication start a --policy 10m", "recovery-point hold a p1",
        "machine promote a --to raw", "machine promote a --to tape --output /x", "machine promote a --to raw --output a.raw", "machine promote a --to raw --output /x --stop-timeout 5",
        "drill schedule set a --every 12h --at 03:00", "drill schedule set a --at 03:00", "drill report show a", "appliance --scrub-pause 1", "appliance --scrub-pause 0s", "appliance --scrub-rate fast",
    ])
    func refuses(words: String) throws {
        let error = #expect(throws: (any Error).self) { _ = try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init)) }
        #expect(Afterimage.exitCode(for: try #require(error)).rawValue == 64)
    }

    @Test("Start Replication's settings reach the request; what is not said is left out")
    func replicationRequest() throws {
        let full = try parse("replication start a --disk vda --disk vdb --epoch-ms 250 --throttle 10MiB --no-automatic-restart --cpus 4 --memory 2048", as: ReplicationCommand.Start.self).request
        #expect(full.disks == ["vda", "vdb"] && full.epochMilliseconds == 250 && full.throttleBytesPerSecond == 10 << 20)
        #expect(full.automaticRestart == false && full.cpus == 4 && full.memoryMiB == 2048)
        let empty = try parse("replication start a", as: ReplicationCommand.Start.self).request
        #expect(empty.disks == nil && empty.epochMilliseconds == nil && empty.automaticRestart == nil && empty.cpus == nil)
    }

    @Test("the machine's settings reach the request")
    func machineRequest() throws {
        let start = try parse("drill start a --network user --forward 2222:22 --forward 8080:80 --cpus 1 --memory 256 --boot-timeout 9", as: DrillCommand.Start.self)
        let request = try start.machine.request(point: start.point)
        #expect(request.recoveryPoint == "latest" && request.network == .user && request.networkName == nil && request.cpus == 1 && request.memoryMiB == 256 && request.bootSecondsMax == 9)
        #expect(request.forwards == [PortForward(hostPort: 2222, guestPort: 22), PortForward(hostPort: 8080, guestPort: 80)])
    }

    @Test("the appliance's set-up")
    func applianceConfiguration() throws {
        let configuration = try parse("appliance --state /s --listen [::1]:9 --link 10.0.0.1:10 --qemu /q --qemu-data /d1 --qemu-data /d2 --accel tcg", as: ApplianceCommand.self).applianceConfiguration
        #expect(configuration.storeDirectory == "/s/store" && configuration.listen == ListenAddress(host: "::1", port: 9))
        #expect(configuration.qemu.dataDirectories == ["/d1", "/d2"] && configuration.qemu.accelerator == .tcg)
    }

    @Test("upkeep and scrubbing are set up as they are asked for, and sensibly when they are not")
    func upkeepConfiguration() throws {
        let asked = try parse("appliance --upkeep-rate 8MiB --tighten-when-low --scrub-rate 1MiB --scrub-pause 2h", as: ApplianceCommand.self).applianceConfiguration.upkeep
        #expect(asked == UpkeepConfiguration(bytesPerSecond: 8 << 20, tightensWhenLow: true, scrub: ScrubConfiguration(bytesPerSecond: 1 << 20, pauseSeconds: 7200)))
        #expect(try parse("appliance", as: ApplianceCommand.self).applianceConfiguration.upkeep == UpkeepConfiguration())
    }

    @Test("defaults are shown as they would be written")
    func defaults() {
        #expect(ByteCount(bytes: 64 << 20).defaultValueDescription == "64MiB" && ByteCount(bytes: 1000).defaultValueDescription == "1000" && ByteCount(bytes: 0).defaultValueDescription == "0")
        #expect([86_400, 600, 90].map { TimeSpan(seconds: $0).defaultValueDescription } == ["24h", "10m", "90s"])
        #expect(ApplianceCommand.helpMessage(columns: 200).contains("(default: 24h)"))
    }

    @Test("a table's last column is wrapped on a terminal and runs free elsewhere")
    func table() {
        let rows = [["1", "ab", "a long note of many words"], ["22", "c", "-"]]
        #expect(Terminal.table(["ID", "X", "NOTE"], rows, columns: nil) == ["ID  X   NOTE", "1   ab  a long note of many words", "22  c   -"])
        let long = [["1", "ab", "a long note of many more words than fit"], ["22", "c", "-"]]
        #expect(Terminal.table(["ID", "X", "NOTE"], long, columns: 40) == ["ID  X   NOTE", "1   ab  a long note of many more words", "        than fit", "22  c   -"])
        #expect(Terminal.table(["ID", "X", "NOTE"], long, columns: 35) == ["ID  X   NOTE", "1   ab", "    a long note of many more words", "    than fit", "22  c   -"], "below its row")
        #expect(Terminal.table(["ID", "X", "NOTE"], long, columns: 20)[1] == "1   ab  a long note of many more words than fit", "no room worth wrapping for")
        #expect(Terminal.wrapped("one/very/long/path and more", 8) == ["one/very/long/path", "and more"])
    }

    @Test("lists of recovery points fit 80 columns")
    func pointRows() {
        var point = RecoveryPoint(
            id: RecoveryPointID("rp-1234567"), group: GroupID("g"), epoch: EpochNumber(1), instance: "i", cutTimeNanoseconds: 1_700_000_000_000_000_000,
            consistency: .application, receivedTimeNanoseconds: 0, dataBytes: 1023 << 20, note: "before the update")
        point.isOnDemand = true
        point.hold = "gold"
        let row = RecoveryPointCommand.row(RecoveryPointView(point: point, damagedBlockCount: 3))
        #expect(row.last == "DAMAGED: 3 blocks; held as \"gold\"; on demand: before the update")
        let lines = Terminal.table(["ID", "CUT", "CONSISTENCY", "DATA", "NOTE"], [row], columns: 80)
        #expect(lines.allSatisfy { $0.count <= 80 }, "\(lines)")
    }

    @Test("a bar fits its terminal and says share, rate and time left")
    func bar() {
        let progress = TaskProgress(step: "Initial Full Sync", doneBytes: 1 << 20, totalBytes: 2 << 20, bytesPerSecond: 10 << 20, secondsLeft: 0.1)
        let line = ProgressBar.line(progress, columns: 100)
        #expect(line == "Initial Full Sync [####################....................]  50 %  1.0 MiB of 2.0 MiB  10.0 MiB/s  0.1 s left" || line.count < 100)
        #expect(line.contains(" 50 %") && line.contains("10.0 MiB/s") && line.contains("0.1 s left") && line.count < 100)
        #expect(ProgressBar.line(progress, columns: 40).count < 40)
    }
}
