//! The filters of the List calls: all conditions that are set must hold.

use std::collections::HashMap;

use caisson_proto::cri;

use crate::store::{ContainerRecord, SandboxRecord};

use super::containers::cri_state;
use super::pods::cri_state as pod_state;

/// Whether every label asked for is there with its value.
pub fn labels(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether an ID is the one asked for, or begins with it; an empty one asks for all.
pub fn id(asked: &str, id: &str) -> bool {
    id.starts_with(asked)
}

/// Whether a pod passes.
pub fn pod(filter: &cri::PodSandboxFilter, record: &SandboxRecord) -> bool {
    id(&filter.id, &record.id)
        && filter
            .state
            .as_ref()
            .is_none_or(|asked| asked.state == pod_state(record) as i32)
        && labels(&filter.label_selector, &record.config.0.labels)
}

/// Whether a container passes.
pub fn container(filter: &cri::ContainerFilter, record: &ContainerRecord) -> bool {
    id(&filter.id, &record.id)
        && id(&filter.pod_sandbox_id, &record.sandbox_id)
        && filter
            .state
            .as_ref()
            .is_none_or(|asked| asked.state == cri_state(record.state) as i32)
        && labels(&filter.label_selector, &record.config.0.labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Proto, SandboxState};

    fn record() -> SandboxRecord {
        SandboxRecord {
            id: "abcdef".into(),
            name: "n".into(),
            handler: String::new(),
            kind: Default::default(),
            created_at: 0,
            state: SandboxState::Ready,
            reason: String::new(),
            silence: None,
            config: Proto(cri::PodSandboxConfig {
                labels: HashMap::from([("app".into(), "web".into())]),
                ..Default::default()
            }),
            network: None,
            user: 0,
        }
    }

    #[test]
    fn all_conditions_must_hold() {
        let ready = cri::PodSandboxStateValue {
            state: cri::PodSandboxState::SandboxReady as i32,
        };
        let stopped = cri::PodSandboxStateValue {
            state: cri::PodSandboxState::SandboxNotready as i32,
        };
        let filter = |id: &str, state: Option<cri::PodSandboxStateValue>, app: Option<&str>| {
            cri::PodSandboxFilter {
                id: id.into(),
                state,
                label_selector: app
                    .map(|app| ("app".to_owned(), app.to_owned()))
                    .into_iter()
                    .collect(),
            }
        };
        for (filter, passes) in [
            (filter("", None, None), true),
            (filter("abc", Some(ready), Some("web")), true),
            (filter("abd", None, None), false),
            (filter("", Some(stopped), None), false),
            (filter("", None, Some("db")), false),
        ] {
            assert_eq!(pod(&filter, &record()), passes, "{filter:?}");
        }
    }
}
