//! The threat model's links lead to tests that are there.

use std::collections::HashMap;
use std::path::Path;

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/threat-model.md")).unwrap();
    let mut files = HashMap::new();
    let mut count = 0;
    for link in text.split('[').skip(1) {
        let Some((name, rest)) = link.split_once("](../") else {
            continue;
        };
        let path = rest.split(')').next().unwrap().to_owned();
        let source = files
            .entry(path.clone())
            .or_insert_with(|| std::fs::read_to_string(root.join(&path)).unwrap_or_default());
        let test = source.split_once(&format!("fn {name}("));
        let marked = test.is_some_and(|(before, _)| {
            let end: Vec<_> = before.lines().rev().take(4).collect();
            end.iter().any(|line| line.contains("test"))
        });
        assert!(marked, "{path} has no test {name}");
        count += 1;
    }
    assert!(count > 80, "{count} links");
}
