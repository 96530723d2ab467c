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

    /// Waits until none is being made, which is a machine of nobody's pod.
    pub async fn wait_until_no_template_is_made(&self) {
        let deadline = Instant::now() + WAIT;
        let making = self.state().join("templates/pods");
        while fs::read_dir(&making).map_or(0, Iterator::count) > 0 {
            assert!(Instant::now() < deadline, "{}", self.daemon_log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Whether a template is still being made.
fn is_new(path: &Path) -> bool {
    path.file_name()
        .unwrap()
        .to_string_lossy()
        .starts_with("new-")
}
