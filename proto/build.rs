//! Generates the gRPC code from the `.proto` files, without an external compiler.

use std::path::Path;

const FILES: [&str; 3] = [
    "runtime/v1/api.proto",
    "caisson/agent.proto",
    "caisson/cli.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Asked when it runs: the program may come from a cache.
    let root = Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(FILES, [&root])?;
    tonic_prost_build::configure()
        // An RPC that is not served yet answers `Unimplemented` instead of failing the build.
        .generate_default_stubs(true)
        // Who dials brings the transport (a unix socket, vsock), so that the guest carries no TCP client.
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
