//! The templates that a node has made.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Node;

/// How long a template may take.
const WAIT: Duration = Duration::from_secs(120);

impl Node {
    /// The directories of the templates that are there.
    pub fn templates(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state().join("templates"));
        let paths = entries
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.join("state").exists() && !is_new(path))
            .collect()
    }

    /// Waits until there are so many.
    pub async fn wait_for_templates(&self, count: usize) {
        let deadline = Instant::now() + WAIT;
        while self.templates().len() < count {
            assert!(
                Instant::now() < deadline,
                "no template: {}",
                self.daemon_log()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Whether one is being made.
    pub fn makes_a_template(&self) -> bool {
        let making = self.state().join("templates/pods");
        fs::read_dir(making).is_ok_and(|mut machines| machines.next().is_some())
    }
}

/// Whether a template is still being made.
fn is_new(path: &Path) -> bool {
    path.file_name()
        .unwrap()
        .to_string_lossy()
        .starts_with("new-")
}
