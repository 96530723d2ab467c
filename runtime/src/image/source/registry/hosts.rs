//! Which servers are asked for a registry's content, and how: containerd's `certs.d` directory.
//!
//! `HOST/hosts.toml` below the directory, or else `_default/hosts.toml`, in containerd's format: `server` is the registry
//! itself, each `[host."URL"]` a mirror that is asked before it, in the file's order. A directory without a
//! hosts.toml may hold what Docker puts there: `*.crt`, and `*.cert` with `*.key`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use crate::image::error::ImageError;

/// Largest hosts.toml, certificate or key, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most mirrors of a registry.
const MAX_HOSTS: usize = 32;

/// A server to ask.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Host {
    /// `host` or `host:port`.
    pub name: String,
    /// What the API's paths are put behind: `https://host/v2`.
    pub base: String,
    /// Whether it may say what a tag means.
    pub resolve: bool,
    /// Whether content may be fetched from it.
    pub pull: bool,
    /// Whether it is the registry itself: only that gets credentials.
    pub upstream: bool,
    /// The registry that a mirror is asked for, as mirrors of several need to know (the parameter `ns`).
    pub namespace: Option<String>,
    /// Certificates of authorities that are trusted beside the system's.
    pub ca: Vec<PathBuf>,
    /// A client certificate, and its key if that is in a file of its own.
    pub client: Option<(PathBuf, Option<PathBuf>)>,
    pub skip_verify: bool,
    pub headers: HeaderMap,
    pub dial_timeout: Option<Duration>,
}

/// A file in PEM.
type Pem = Vec<u8>;

/// A string, or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Strings {
    One(String),
    Many(Vec<String>),
}

impl Strings {
    fn list(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// Client certificates: one file, or a list of files and of pairs.
#[derive(Deserialize)]
#[serde(untagged)]
enum Clients {
    One(String),
    Many(Vec<Strings>),
}

/// What can be said of a host; for the registry itself it stands at the top of the file.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    capabilities: Vec<String>,
    ca: Option<Strings>,
    client: Option<Clients>,
    skip_verify: bool,
    override_path: bool,
    header: toml::map::Map<String, toml::Value>,
    dial_timeout: Option<String>,
}

/// The servers for `registry`, in the order in which they are to be asked; the registry itself is the last.
pub(super) fn hosts(certs_dir: &Path, registry: &str) -> Result<Vec<Host>, ImageError> {
    let mut named = vec![registry.to_owned()];
    // containerd's form for file systems that have no colons in names.
    if let Some((host, port)) = registry.rsplit_once(':') {
        named.push(format!("{host}_{port}_"));
    }
    named.push("_default".to_owned());
    for name in named {
        let directory = certs_dir.join(name);
        match fs::metadata(&directory) {
            Ok(found) if found.is_dir() => {}
            _ => continue,
        }
        let file = directory.join("hosts.toml");
        return match read(&file)? {
            Some(text) => parse(&file, &text, registry),
            None => docker_directory(&directory, registry).map(|host| vec![host]),
        };
    }
    plain(registry).map(|host| vec![host])
}

/// The registry itself, when nothing is said of it.
fn plain(registry: &str) -> Result<Host, ImageError> {
    Host::new(registry, registry, true, false).map_err(|reason| ImageError::Hosts {
        path: PathBuf::from(registry),
        reason,
    })
}

/// A file's text; `None` if there is none.
fn read(path: &Path) -> Result<Option<String>, ImageError> {
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ImageError::disk("read", path, error)),
    };
    if !found.is_file() || found.len() > MAX_FILE {
        return Err(ImageError::Hosts {
            path: path.to_owned(),
            reason: "it is not a file of at most 1 MiB".to_owned(),
        });
    }
    fs::read_to_string(path)
        .map(Some)
        .map_err(|error| ImageError::disk("read", path, error))
}

fn parse(path: &Path, text: &str, registry: &str) -> Result<Vec<Host>, ImageError> {
    let wrong = |reason: String| ImageError::Hosts {
        path: path.to_owned(),
        reason,
    };
    let mut table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| wrong(error.to_string().trim().replace('\n', " ")))?;
    let server = match table.remove("server") {
        None => None,
        Some(toml::Value::String(server)) => Some(server),
        Some(_) => return Err(wrong("server is not a string".to_owned())),
    };
    let listed = match table.remove("host") {
        None => toml::Table::new(),
        Some(toml::Value::Table(hosts)) => hosts,
        Some(_) => return Err(wrong("host is not a table".to_owned())),
    };
    if listed.len() > MAX_HOSTS {
        return Err(wrong(format!("it has more than {MAX_HOSTS} hosts")));
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut hosts = Vec::new();
    for (url, value) in listed {
        if url.contains('@') {
            return Err(wrong(
                "a host's URL holds credentials; they are not taken from there".to_owned(),
            ));
        }
        let fields: Fields = value
            .try_into()
            .map_err(|error| wrong(format!("host {url:?}: {error}").replace('\n', " ")))?;
        let host = Host::configured(&url, registry, false, fields, directory);
        hosts.push(host.map_err(|reason| wrong(format!("host {url:?}: {reason}")))?);
    }
    let fields: Fields = toml::Value::Table(table)
        .try_into()
        .map_err(|error: toml::de::Error| wrong(error.to_string().trim().replace('\n', " ")))?;
    let server = server.filter(|server| !server.is_empty());
    let url = server.as_deref().unwrap_or(registry);
    hosts.push(Host::configured(url, registry, true, fields, directory).map_err(wrong)?);
    Ok(hosts)
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) -> Option<String> {
    let path = Path::new("/etc/hosts.toml");
    match parse(path, text, "registry.example:5000") {
        Ok(hosts) => {
            assert!((1..=MAX_HOSTS + 1).contains(&hosts.len()));
            // Credentials go to the registry itself alone, and that is the last.
            let upstream = hosts.iter().rposition(|host| host.upstream);
            assert_eq!(upstream, Some(hosts.len() - 1));
            assert_eq!(hosts.iter().filter(|host| host.upstream).count(), 1);
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

/// What Docker's own directory of certificates says.
fn docker_directory(directory: &Path, registry: &str) -> Result<Host, ImageError> {
    let wrong = |reason: String| ImageError::Hosts {
        path: directory.to_owned(),
        reason,
    };
    let (mut ca, mut client) = (Vec::new(), None);
    let entries =
        fs::read_dir(directory).map_err(|error| ImageError::disk("read", directory, error))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| ImageError::disk("read", directory, error))?;
        files.push(entry.path());
    }
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.is_file() {
                    return Err(wrong(format!("{} has no .key beside it", file.display())));
                }
                if client.replace((file, Some(key))).is_some() {
                    return Err(wrong(
                        "it has several client certificates; leave one".to_owned(),
                    ));
                }
            }
            _ => {}
        }
    }
    let tls = !ca.is_empty() || client.is_some();
    let host = Host::new(registry, registry, true, tls).map_err(wrong)?;
    Ok(Host { ca, client, ..host })
}

impl Host {
    /// A host by its URL, or by its name alone. `tls` says that one without a scheme is not on plain HTTP.
    fn new(url: &str, registry: &str, upstream: bool, tls: bool) -> Result<Self, String> {
        let url = url.trim_end_matches('/');
        // The one name that is not its registry's address.
        let url = if upstream && url == "docker.io" {
            "registry-1.docker.io"
        } else {
            url
        };
        let full = if url.contains("://") {
            url.to_owned()
        } else {
            let plain = !tls && is_local(url);
            format!("{}://{url}", if plain { "http" } else { "https" })
        };
        let parsed = Url::parse(&full).map_err(|error| format!("{url:?} is not a URL: {error}"))?;
        if !matches!(parsed.scheme(), "http" | "https") {
            return Err(format!("{url:?} has another scheme than http and https"));
        }
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err("the URL holds credentials; they are not taken from there".to_owned());
        }
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(format!("{url:?} has more than a host and a path"));
        }
        // As it is written, with a port that could have been left out.
        let name = full
            .split_once("://")
            .and_then(|(_, rest)| rest.split('/').next())
            .unwrap_or_default()
            .to_owned();
        let path = parsed.path().trim_end_matches('/');
        let known_alias = registry == "docker.io" && name == "registry-1.docker.io";
        Ok(Self {
            base: format!("{}://{name}{path}", parsed.scheme()),
            resolve: true,
            pull: true,
            upstream,
            namespace: (name != registry && !known_alias).then(|| registry.to_owned()),
            name,
            ca: Vec::new(),
            client: None,
            skip_verify: false,
            headers: HeaderMap::new(),
            dial_timeout: None,
        }
        .with_version_path(false))
    }

    /// The host of any URL: https, or on the machine itself.
    pub(super) fn of_url(url: &str) -> Result<Self, String> {
        let host = Self::new(url, "", false, true)?;
        if host.base.starts_with("http:") && !is_local(&host.name) {
            return Err(format!("{url:?} is not on https"));
        }
        Ok(host)
    }

    /// `/v2` behind the base, unless the path is to be taken as it is.
    fn with_version_path(mut self, as_is: bool) -> Self {
        if !as_is && !self.base.ends_with("/v2") {
            self.base.push_str("/v2");
        }
        self
    }

    fn configured(
        url: &str,
        registry: &str,
        upstream: bool,
        fields: Fields,
        directory: &Path,
    ) -> Result<Self, String> {
        let tls = fields.ca.is_some() || fields.client.is_some() || fields.skip_verify;
        let mut host = Self::new(url, registry, upstream, tls)?;
        if fields.override_path {
            // Taken as it is written, with a version or without.
            let written = url.trim_end_matches('/');
            if !written.ends_with("/v2") && host.base.ends_with("/v2") {
                host.base.truncate(host.base.len() - "/v2".len());
            }
        }
        if !fields.capabilities.is_empty() {
            (host.resolve, host.pull) = (false, false);
        }
        for capability in &fields.capabilities {
            match capability.as_str() {
                "resolve" => host.resolve = true,
                "pull" => host.pull = true,
                // Nothing is ever pushed.
                "push" => {}
                other => {
                    return Err(format!(
                        "the capability {other:?} is not known; use pull and resolve"
                    ));
                }
            }
        }
        let path = |name: String| directory.join(name);
        host.ca = fields
            .ca
            .map(Strings::list)
            .unwrap_or_default()
            .into_iter()
            .map(path)
            .collect();
        host.client =
            client(fields.client)?.map(|(certificate, key)| (path(certificate), key.map(path)));
        host.skip_verify = fields.skip_verify;
        host.dial_timeout = fields.dial_timeout.as_deref().map(duration).transpose()?;
        for (name, value) in fields.header {
            let strings: Strings = value.try_into().map_err(|_| {
                format!("the header {name:?} is neither a string nor a list of strings")
            })?;
            let key = HeaderName::try_from(name.as_str())
                .map_err(|_| format!("{name:?} is not a name for a header"))?;
            for value in strings.list() {
                let mut value = HeaderValue::try_from(value).map_err(|_| {
                    format!("the header {name:?} has a value that HTTP does not allow")
                })?;
                value.set_sensitive(true);
                host.headers.append(key.clone(), value);
            }
        }
        Ok(host)
    }

    /// Reads the certificates of authorities, and the client's own with its key, as PEM.
    pub(super) fn certificates(&self) -> Result<(Vec<Pem>, Option<Pem>), ImageError> {
        let load = |path: &PathBuf| {
            read(path)?.ok_or_else(|| ImageError::Hosts {
                path: path.clone(),
                reason: "there is no such file".to_owned(),
            })
        };
        let mut authorities = Vec::new();
        for path in &self.ca {
            authorities.push(load(path)?.into_bytes());
        }
        let identity = match &self.client {
            None => None,
            Some((certificate, key)) => {
                let mut text = load(certificate)?;
                if let Some(key) = key {
                    text.push('\n');
                    text.push_str(&load(key)?);
                }
                Some(text.into_bytes())
            }
        };
        Ok((authorities, identity))
    }
}

/// The one client certificate. TLS here can offer one, so several are refused rather than left out.
fn client(clients: Option<Clients>) -> Result<Option<(String, Option<String>)>, String> {
    let mut list = match clients {
        None => return Ok(None),
        Some(Clients::One(one)) => vec![Strings::One(one)],
        Some(Clients::Many(many)) => many,
    };
    if list.len() > 1 {
        return Err("it has several client certificates; leave one".to_owned());
    }
    let Some(entry) = list.pop() else {
        return Ok(None);
    };
    match entry.list().as_slice() {
        [one] => Ok(Some((one.clone(), None))),
        [certificate, key] if key.is_empty() => Ok(Some((certificate.clone(), None))),
        [certificate, key] => Ok(Some((certificate.clone(), Some(key.clone())))),
        _ => Err("a client certificate is one file, or a pair of certificate and key".to_owned()),
    }
}

/// A duration as Go writes it: `30s`, `1m30s`, `500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration; write it as 30s or 1m30s");
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u32 = rest[..digits].parse().map_err(|_| wrong())?;
        let after = &rest[digits..];
        let unit = after
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(after.len());
        let unit_length = match &after[..unit] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(wrong()),
        };
        total = unit_length
            .checked_mul(number)
            .and_then(|part| total.checked_add(part))
            .ok_or_else(wrong)?;
        rest = &after[unit..];
    }
    if total.is_zero() || total > Duration::from_secs(24 * 3600) {
        return Err(wrong());
    }
    Ok(total)
}

/// Plain HTTP is the custom of registries on the machine itself.
fn is_local(host: &str) -> bool {
    let host = host.split('/').next().unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests;
