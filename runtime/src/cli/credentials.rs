//! Credentials from Docker's `config.json`, as `docker login` and `podman login` write it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use caisson_proto::cli::PullRequest;
use serde::Deserialize;

use super::client::CliError;
use crate::image::{Auth, Reference};

/// The largest file.
const MAX_FILE: u64 = 4 << 20;

#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    auths: BTreeMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    #[serde(rename = "identitytoken")]
    identity_token: String,
    #[serde(rename = "registrytoken")]
    registry_token: String,
}

/// Adds what the file has for the image's registry. A usual file that is missing has nothing.
pub fn fill(request: &mut PullRequest, named: Option<&Path>) -> Result<(), CliError> {
    let Some(path) = named.map(Path::to_owned).or_else(usual) else {
        return Ok(());
    };
    let wrong = |cause| CliError::Io {
        what: format!("{} cannot be read", path.display()),
        cause,
    };
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => return Ok(()),
        Err(error) => return Err(wrong(error)),
        Ok(file) if file.len() > MAX_FILE => {
            return Err(wrong(io::Error::other("it is larger than 4 MiB")));
        }
        Ok(_) => {}
    }
    let text = std::fs::read_to_string(&path).map_err(wrong)?;
    from_text(request, &text)
        .map_err(|reason| CliError::Usage(format!("{}: {reason}", path.display())))
}

/// Where Docker has it.
fn usual() -> Option<PathBuf> {
    let directory = match std::env::var_os("DOCKER_CONFIG") {
        Some(directory) if !directory.is_empty() => PathBuf::from(directory),
        _ => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
    };
    Some(directory.join("config.json"))
}

fn from_text(request: &mut PullRequest, text: &str) -> Result<(), String> {
    // A name that is none, or an ID, is the daemon's to refuse.
    let Ok(image) = request.image.parse::<Reference>() else {
        return Ok(());
    };
    let file: File =
        serde_json::from_str(text).map_err(|error| format!("it is not valid: {error}"))?;
    let helper = file.helpers.iter().find(|(server, _)| image.is_at(server));
    // The entry that says most: podman has some for a path of a registry.
    let name = image.name();
    let entry = file
        .auths
        .iter()
        .filter(|(server, _)| {
            let path = server
                .split_once("://")
                .map_or(&***server, |(_, rest)| rest);
            let exact = path.split_once('/').is_none_or(|(_, rest)| {
                rest.is_empty() || matches!(rest, "v1/" | "v1" | "v2/" | "v2")
            });
            image.is_at(server) && (exact || name == path || name.starts_with(&format!("{path}/")))
        })
        .max_by_key(|(server, _)| server.len())
        .map(|(_, entry)| entry);
    let Some(entry) = entry else {
        return match helper {
            Some((_, helper)) => Err(no_helper(&image, helper)),
            None => Ok(()),
        };
    };
    if !entry.identity_token.is_empty() {
        request.identity_token.clone_from(&entry.identity_token);
    } else if !entry.registry_token.is_empty() {
        request.registry_token.clone_from(&entry.registry_token);
    } else if !entry.username.is_empty() {
        request.username.clone_from(&entry.username);
        request.password.clone_from(&entry.password);
    } else if !entry.auth.is_empty() {
        match Auth::from_encoded(&entry.auth) {
            Ok(Auth::Basic { username, password }) => {
                (request.username, request.password) = (username, password);
            }
            _ => {
                return Err(format!(
                    "the auth value for {} is not base64 of user:password",
                    image.host()
                ));
            }
        }
    } else if let Some((_, helper)) = helper {
        return Err(no_helper(&image, helper));
    } else if !file.store.is_empty() {
        return Err(no_helper(&image, &file.store));
    }
    Ok(())
}

fn no_helper(image: &Reference, helper: &str) -> String {
    let helper: String = helper.chars().take(60).collect();
    format!(
        "the credentials for {} are kept by docker-credential-{helper}, which Caisson does not run; use --creds, or log in without a helper",
        image.host()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(image: &str, text: &str) -> Result<PullRequest, String> {
        let mut request = PullRequest {
            image: image.to_owned(),
            ..PullRequest::default()
        };
        from_text(&mut request, text)?;
        Ok(request)
    }

    #[test]
    fn the_entry_for_the_registry() {
        // "user:pa:ss" and "other:x".
        let text = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "dXNlcjpwYTpzcw=="},
            "reg.example:5000": {"username": "u", "password": "p"},
            "reg.example:5000/team": {"auth": "b3RoZXI6eA=="},
            "azure.example": {"auth": "b3RoZXI6eA==", "identitytoken": "refresh"},
            "token.example": {"registrytoken": "bearer"}},
            "HttpHeaders": {}}"#;
        let user = |image: &str| {
            let request = filled(image, text).unwrap();
            (request.username, request.password)
        };
        let is = |user: &str, password: &str| (user.to_owned(), password.to_owned());
        assert_eq!(user("busybox"), is("user", "pa:ss"));
        assert_eq!(user("docker.io/a/b:v1"), is("user", "pa:ss"));
        assert_eq!(user("reg.example:5000/a"), is("u", "p"));
        assert_eq!(user("reg.example:5000/team/a"), is("other", "x"));
        assert_eq!(user("reg.example:5000/teams/a"), is("u", "p"));
        assert_eq!(user("reg.example/a"), is("", ""));
        assert_eq!(
            filled("azure.example/a", text).unwrap().identity_token,
            "refresh"
        );
        assert_eq!(
            filled("token.example/a", text).unwrap().registry_token,
            "bearer"
        );
    }

    #[test]
    fn helpers_are_refused_where_they_would_be_asked() {
        let helpers = r#"{"credHelpers": {"gcr.example": "gcloud"}, "auths": {"b.example": {"auth": "dTpw"}}}"#;
        assert!(
            filled("gcr.example/a", helpers)
                .unwrap_err()
                .contains("docker-credential-gcloud")
        );
        assert_eq!(filled("b.example/a", helpers).unwrap().username, "u");
        let store = r#"{"auths": {"a.example": {}}, "credsStore": "desktop"}"#;
        assert!(
            filled("a.example/a", store)
                .unwrap_err()
                .contains("desktop")
        );
        assert_eq!(filled("b.example/a", store).unwrap().username, "");
        assert!(filled("a.example/a", "{").is_err());
        let broken = r#"{"auths": {"a.example": {"auth": "!"}}}"#;
        assert!(filled("a.example/a", broken).is_err());
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let mut request = PullRequest::default();
        assert!(fill(&mut request, Some(Path::new("/nonexistent/config.json"))).is_err());
    }
}
