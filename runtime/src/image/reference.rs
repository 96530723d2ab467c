//! Image references, as Docker and Kubernetes write them: `busybox`, `quay.io/org/app:v2`, `localhost:5000/a/b@sha256:…`.
//!
//! The grammar is that of the distribution project; a name without a host means Docker Hub, one without a tag and
//! digest means `latest`.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;
use super::error::ImageError;

/// Host of names that give none.
const DEFAULT_HOST: &str = "docker.io";
/// Longest name (host, slash and path), in bytes: the distribution project's limit.
const MAX_NAME: usize = 255;
/// Longest tag, in bytes.
const MAX_TAG: usize = 128;

/// A reference in its full form. Every part was checked, so that it can be put in a URL as it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The registry's host, with its port if it has one: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path in the registry: `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag. `None` only if there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Host and path: `docker.io/library/busybox`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// The tagged name (`docker.io/library/busybox:latest`), if this reference is by tag alone.
    pub fn tagged(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// Whether the image is at this server: a host or a URL, as credentials name theirs. Docker Hub has several names.
    pub fn is_at(&self, server: &str) -> bool {
        let server = server.split_once("://").map_or(server, |(_, rest)| rest);
        match server.split('/').next().unwrap_or_default() {
            "index.docker.io" | "registry-1.docker.io" => self.host == DEFAULT_HOST,
            host => self.host == host,
        }
    }

    /// The name with `digest` (`docker.io/library/busybox@sha256:…`).
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let invalid = |reason: &str| ImageError::InvalidReference {
            reference: text.chars().take(160).collect(),
            reason: reason.to_owned(),
        };
        if text.len() > MAX_NAME + MAX_TAG + 80 {
            return Err(invalid("it is too long"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse::<Digest>().map_err(|error| match error {
                    ImageError::InvalidReference { reason, .. } => invalid(&reason),
                    other => other,
                })?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon after the last slash begins a tag; one before it, a port.
        let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_end..].split_once(':') {
            Some((last, tag)) => (&rest[..name_end + last.len()], Some(tag)),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag).map_err(invalid)?;
        }
        let (host, path) = match name.split_once('/') {
            Some((host, path)) if is_host(host) => (host, path.to_owned()),
            _ => (DEFAULT_HOST, name.to_owned()),
        };
        let host = if host == "index.docker.io" {
            DEFAULT_HOST
        } else {
            host
        };
        check_host(host).map_err(invalid)?;
        let repository = if host == DEFAULT_HOST && !path.contains('/') {
            format!("library/{path}")
        } else {
            path
        };
        for component in repository.split('/') {
            check_component(component).map_err(invalid)?;
        }
        if host.len() + 1 + repository.len() > MAX_NAME {
            return Err(invalid("its name is longer than 255 characters"));
        }
        if digest.is_none() && tag.is_none() && Digest::from_hex(name).is_some() {
            return Err(invalid("64 hexadecimal digits are an image ID, not a name"));
        }
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Self {
            host: host.to_owned(),
            repository,
            tag,
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Whether the first component of a name is a host: Docker's rule, which tells `localhost/x` from `library/x`.
fn is_host(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':'])
        || component.bytes().any(|byte| byte.is_ascii_uppercase())
}

/// `host`, `host:port`, `[v6]:port`.
fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest
                .split_once(']')
                .ok_or("its host has no closing bracket")?;
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return Err("its host is not an IPv6 address");
            }
            match after {
                "" => (None, None),
                _ => (
                    None,
                    Some(
                        after
                            .strip_prefix(':')
                            .ok_or("its host has text after the bracket")?,
                    ),
                ),
            }
        }
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    if let Some(name) = name {
        let label_ok = |label: &str| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !name.split('.').all(label_ok) {
            return Err("its host has characters that a host name cannot have");
        }
    }
    match port {
        Some(port)
            if !port.bytes().all(|byte| byte.is_ascii_digit())
                || !port.parse::<u16>().is_ok_and(|n| n > 0) =>
        {
            Err("its port is not a number from 1 to 65535")
        }
        _ => Ok(()),
    }
}

/// Letters and digits, separated by one dot, one or two underscores, or any number of dashes.
fn check_component(component: &str) -> Result<(), &'static str> {
    const RULE: &str =
        "a part of its path is not lower-case letters and digits with separators between them";
    let bytes = component.as_bytes();
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    match (bytes.first(), bytes.last()) {
        (Some(first), Some(last)) if alphanumeric(first) && alphanumeric(last) => {}
        (None, _) => return Err("a part of its path is empty"),
        _ => return Err(RULE),
    }
    let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    for separator in separators {
        let ok = matches!(separator, "" | "." | "_" | "__")
            || separator.bytes().all(|byte| byte == b'-');
        if !ok {
            return Err(RULE);
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    match bytes.first() {
        None => Err("its tag is empty"),
        Some(first) if !word(*first) => {
            Err("its tag does not begin with a letter, a digit or an underscore")
        }
        _ if bytes.len() > MAX_TAG => Err("its tag is longer than 128 characters"),
        _ if !bytes
            .iter()
            .all(|byte| word(*byte) || matches!(byte, b'.' | b'-')) =>
        {
            Err("its tag has a character that a tag cannot have")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn full_forms() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            (
                "index.docker.io/library/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("org/app", "docker.io/org/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
            ("[::1]:5000/a:x", "[::1]:5000/a:x"),
            ("Registry/app", "Registry/app:latest"),
            (
                "quay.io/a_b/c__d/e---f.g:V1.0_x-y",
                "quay.io/a_b/c__d/e---f.g:V1.0_x-y",
            ),
        ] {
            assert_eq!(
                text.parse::<Reference>().unwrap().to_string(),
                full,
                "{text}"
            );
            assert_eq!(full.parse::<Reference>().unwrap().to_string(), full);
        }
        let pinned: Reference = format!("busybox:1@sha256:{HEX}").parse().unwrap();
        assert_eq!(
            pinned.to_string(),
            format!("docker.io/library/busybox:1@sha256:{HEX}")
        );
        assert_eq!(pinned.tagged(), None);
        let bare: Reference = format!("busybox@sha256:{HEX}").parse().unwrap();
        assert_eq!(bare.tag(), None);
    }

    #[test]
    fn refuses_what_is_not_a_reference() {
        for text in [
            "",
            ":",
            "@",
            "/",
            "a//b",
            "../etc",
            "a/../b",
            "a/./b",
            "busybox:",
            "busybox:-x",
            "busybox:a/b:",
            "Busybox",
            "a b",
            "a\0b",
            "a\nb",
            "a?b",
            "a#b",
            "a%2fb",
            "host.io/",
            "host:0/a",
            "host:65536/a",
            "host:+80/a",
            "host:x/a",
            "-host.io/a",
            "h..io/a",
            "[::1/a",
            "[zz]/a",
            "user@host.io/a",
            "a___b",
            "a..b",
            "_a",
            "a-",
            "http://host/a",
            "busybox@sha256:00",
            "busybox@sha512:00",
            HEX,
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
        assert!("a".repeat(300).parse::<Reference>().is_err());
        assert!(
            format!("a:{}", "t".repeat(129))
                .parse::<Reference>()
                .is_err()
        );
    }
}
