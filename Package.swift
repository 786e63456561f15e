// swift-tools-version: 6.2
import PackageDescription

// Arrows point one way: BlockTap knows nothing of the network, Replica nothing of servers and sites,
// Appliance moves no data itself (see ARCHITECTURE.md).
// The tests run on the release build, the one that users get, and look inside the modules.
let settings: [SwiftSetting] = [.unsafeFlags(["-enable-testing"], .when(configuration: .release))]

let package = Package(
    name: "afterimage",
    products: [
        .executable(name: "afterimage", targets: ["afterimage"]),
        .executable(name: "order-check", targets: ["order-check"]),
        .executable(name: "simulate", targets: ["simulate"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.0"),
        .package(url: "https://github.com/apple/swift-nio", from: "2.101.0"),
        .package(url: "https://github.com/apple/swift-nio-ssl", from: "2.37.0"),
        .package(url: "https://github.com/apple/swift-certificates", from: "1.21.0"),
        .package(url: "https://github.com/apple/swift-asn1", from: "1.7.0"),
        .package(url: "https://github.com/apple/swift-crypto", from: "4.5.0"),
        .package(url: "https://github.com/hummingbird-project/hummingbird", from: "2.28.0"),
        .package(url: "https://github.com/swift-server/async-http-client", from: "1.37.0"),
        .package(url: "https://github.com/groue/GRDB.swift", from: "7.10.0"),
        .package(url: "https://github.com/swift-server/swift-service-lifecycle", from: "2.13.0"),
        .package(url: "https://github.com/swiftlang/swift-subprocess", from: "1.0.0"),
    ],
    targets: [
        .target(name: "CIoUring", linkerSettings: [.linkedLibrary("uring")]),
        .target(name: "CLiveTap", exclude: ["live-tap.bpf.c"], linkerSettings: [.linkedLibrary("bpf")]),
        .systemLibrary(name: "CXXHash", pkgConfig: "libxxhash", providers: [.apt(["libxxhash-dev"])]),
        .systemLibrary(name: "CLZ4", pkgConfig: "liblz4", providers: [.apt(["liblz4-dev"])]),
        .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(name: "CLibNBD", pkgConfig: "libnbd", providers: [.apt(["libnbd-dev"])]),
        .systemLibrary(name: "CLibAIO", providers: [.apt(["libaio-dev"])]),
        .target(name: "BlockTap", dependencies: ["CIoUring", "CLiveTap"], swiftSettings: settings),
        .target(
            name: "Replica",
            dependencies: [
                "BlockTap", "CIoUring", "CXXHash", "CLZ4", "CZstd",
                .product(name: "Logging", package: "swift-log"),
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "NIOSSL", package: "swift-nio-ssl"),
                .product(name: "X509", package: "swift-certificates"),
                .product(name: "SwiftASN1", package: "swift-asn1"),
                .product(name: "Crypto", package: "swift-crypto"),
            ],
            swiftSettings: settings),
        .target(
            name: "Appliance",
            dependencies: [
                "BlockTap", "Replica", "CZlib",
                .product(name: "Hummingbird", package: "hummingbird"),
                .product(name: "HummingbirdTLS", package: "hummingbird"),
                .product(name: "GRDB", package: "GRDB.swift"),
                .product(name: "AsyncHTTPClient", package: "async-http-client"),
                .product(name: "ServiceLifecycle", package: "swift-service-lifecycle"),
                .product(name: "Subprocess", package: "swift-subprocess"),
                .product(name: "Logging", package: "swift-log"),
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "NIOSSL", package: "swift-nio-ssl"),
                .product(name: "X509", package: "swift-certificates"),
                .product(name: "Crypto", package: "swift-crypto"),
                .product(name: "CryptoExtras", package: "swift-crypto"),
            ],
            swiftSettings: settings),
        .executableTarget(
            name: "afterimage",
            dependencies: [
                "Appliance", "BlockTap", "Replica",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings),
        .executableTarget(
            name: "order-check",
            dependencies: [
                "BlockTap", "Replica", "CIoUring", "CLibNBD",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: settings),
        // The store on simulated files against a model: the tool `simulate` and the tests share it.
        .target(name: "StoreSimulation", dependencies: ["BlockTap", "Replica", .product(name: "Logging", package: "swift-log")], swiftSettings: settings),
        .executableTarget(name: "simulate", dependencies: ["StoreSimulation", .product(name: "ArgumentParser", package: "swift-argument-parser")]),
        // Loads for `tools/bench`.
        .executableTarget(
            name: "store-bench",
            dependencies: [
                "BlockTap", "Replica",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ]),
        // A store that is killed while it does everything at once, and what verifies it afterwards.
        .executableTarget(
            name: "store-torture",
            dependencies: [
                "BlockTap", "Replica",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ]),
        // Appliances, agents and machines that are killed while anything is asked of them, against a model of the state table.
        .executableTarget(name: "lifecycle-model", dependencies: ["Appliance", .product(name: "ArgumentParser", package: "swift-argument-parser")]),
        // A process with nothing but a live tap in it, for tests to kill; and the check of the live tap for guests.
        .executableTarget(name: "live-tap-holder", dependencies: ["BlockTap", "CLiveTap"]),
        .testTarget(name: "BlockTapTests", dependencies: ["BlockTap", "CIoUring", "CLiveTap", "live-tap-holder"]),
        .testTarget(name: "ReplicaTests", dependencies: ["BlockTap", "Replica", "StoreSimulation", "CLZ4", "order-check"]),
        .testTarget(
            name: "ApplianceTests",
            dependencies: [
                "Appliance", "BlockTap", "Replica", "afterimage",
                .product(name: "AsyncHTTPClient", package: "async-http-client"),
                .product(name: "HummingbirdTesting", package: "hummingbird"),
                .product(name: "NIOEmbedded", package: "swift-nio"),
            ]),
    ]
)
