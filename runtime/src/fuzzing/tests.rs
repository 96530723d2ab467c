//! What the fuzzers begin with, and what they have found.

use std::path::Path;

fn seeds(target: &str, run: impl Fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds");
    let mut count = 0;
    for entry in std::fs::read_dir(seeds.join(target)).unwrap() {
        run(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "{target} has no seeds");
}

#[test]
fn agent_replies() {
    seeds("agent_replies", super::agent_replies);
}

#[test]
fn config_files() {
    seeds("config_files", super::config_files);
}

#[test]
fn image_documents() {
    seeds("image_documents", super::image_documents);
}
