//! Generates a client of CRI `v1alpha2`, as a kubelet of before Kubernetes 1.26 has it: the messages of that interface
//! are those of `v1` with the same field numbers, under another package name.

use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Asked when it runs: the program may come from a cache.
    let v1 =
        Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../proto/proto/runtime/v1/api.proto");
    println!("cargo:rerun-if-changed={}", v1.display());
    let out = env::var("OUT_DIR")?;
    let text = fs::read_to_string(v1)?;
    let renamed = text.replace("package runtime.v1;", "package runtime.v1alpha2;");
    if renamed == text {
        return Err("api.proto has no package runtime.v1".into());
    }
    let file = Path::new(&out).join("v1alpha2.proto");
    fs::write(&file, renamed)?;
    let descriptors = protox::compile([&file], [&out])?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
