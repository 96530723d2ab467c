//! Manifests, indexes and image configurations: parsed strictly, within bounds.
//!
//! OCI image specification 1.1 ("manifest.md", "image-index.md", "config.md") and Docker's image manifest version 2,
//! schema 2. Schema 1 is refused.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::digest::{DiffId, Digest};
use super::error::ImageError;
use super::layer::Compression;

/// Largest manifest or index, in bytes (the limit that registries have).
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image configuration, in bytes.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;
/// Most entries of an index.
const MAX_INDEX_ENTRIES: usize = 1000;
/// How deep indexes may be nested in indexes.
pub(crate) const MAX_INDEX_DEPTH: usize = 3;
/// Most layers of an image (what overlayfs in the guest and the design allow).
pub(crate) const MAX_LAYERS: usize = 127;

/// Media types to ask a registry for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// A descriptor (OCI "descriptor.md"): what a blob is, and how to know it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Where else the content is.
    #[serde(default)]
    pub urls: Option<Vec<String>>,
}

/// Whether the layer is one that registries do not distribute (OCI "layer.md", "Non-Distributable Layers").
pub(crate) fn is_foreign(descriptor: &Descriptor) -> bool {
    let kind = &descriptor.media_type;
    kind.starts_with("application/vnd.oci.image.layer.nondistributable.v1.")
        || kind.starts_with("application/vnd.docker.image.rootfs.foreign.diff.")
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(default)]
    pub variant: Option<String>,
}

impl Platform {
    /// Whether it runs in Caisson's guest: Linux on x86-64. A micro-architecture level above v1 is only second choice.
    fn rank(&self) -> Option<u8> {
        match (
            self.os.as_str(),
            self.architecture.as_str(),
            self.variant.as_deref(),
        ) {
            ("linux", "amd64", None | Some("" | "v1")) => Some(0),
            ("linux", "amd64", Some("v2")) => Some(1),
            _ => None,
        }
    }
}

/// What a manifest document turns out to be.
#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// An image manifest: its configuration, and its layers, the lowest first.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct RawDocument {
    #[serde(rename = "schemaVersion")]
    schema_version: Option<u64>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses a manifest or an index, told apart by its fields. One that could be read as both is refused
    /// (CVE-2021-41190).
    pub(crate) fn parse(what: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(ImageError::too_large(what, "a manifest can have 4 MiB"));
        }
        let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| {
            ImageError::corrupt(what, format!("the manifest is not valid: {error}"))
        })?;
        if raw.schema_version == Some(1) {
            return Err(ImageError::unsupported(
                what,
                "it is a Docker schema 1 manifest; push it with a newer client",
            ));
        }
        if raw.schema_version != Some(2) {
            return Err(ImageError::corrupt(
                what,
                "the manifest's schemaVersion is not 2",
            ));
        }
        match (raw.manifests, raw.config, raw.layers) {
            (Some(entries), None, None) => {
                if entries.len() > MAX_INDEX_ENTRIES {
                    return Err(ImageError::too_large(
                        what,
                        format!(
                            "its index has {} entries, and {MAX_INDEX_ENTRIES} is the limit",
                            entries.len()
                        ),
                    ));
                }
                Ok(Self::Index(entries))
            }
            (None, Some(config), Some(layers)) => {
                Manifest::new(what, config, layers).map(Self::Manifest)
            }
            (Some(_), ..) => Err(ImageError::corrupt(
                what,
                "the document is a manifest and an index at once",
            )),
            _ => Err(ImageError::corrupt(
                what,
                "the manifest lacks its config or its layers",
            )),
        }
    }
}

impl Manifest {
    fn new(what: &str, config: Descriptor, layers: Vec<Descriptor>) -> Result<Self, ImageError> {
        if !matches!(
            config.media_type.as_str(),
            "application/vnd.oci.image.config.v1+json"
                | "application/vnd.docker.container.image.v1+json"
        ) {
            let kind: String = config.media_type.chars().take(120).collect();
            return Err(ImageError::unsupported(
                what,
                format!("its configuration has the type {kind:?}: it is not a container image"),
            ));
        }
        if config.size > MAX_CONFIG {
            return Err(ImageError::too_large(
                what,
                "its configuration is larger than 8 MiB",
            ));
        }
        if layers.len() > MAX_LAYERS {
            return Err(ImageError::too_large(
                what,
                format!(
                    "it has {} layers, and {MAX_LAYERS} is the limit",
                    layers.len()
                ),
            ));
        }
        Ok(Self { config, layers })
    }
}

/// Chooses from an index what runs on linux/amd64: the first entry of the best rank. An index that names no platform at all
/// gives its only entry; the configuration is checked later in any case. Attestations, which describe other entries,
/// are passed over.
pub(crate) fn select(what: &str, entries: &[Descriptor]) -> Result<Descriptor, ImageError> {
    let entries: Vec<&Descriptor> = entries
        .iter()
        .filter(|entry| !is_attestation(entry))
        .collect();
    let best = entries
        .iter()
        .filter_map(|entry| Some((entry.platform.as_ref()?.rank()?, entry)))
        .min_by_key(|(rank, _)| *rank);
    match (best, &*entries) {
        (Some((_, entry)), _) => Ok((*entry).clone()),
        (None, [only]) if only.platform.is_none() => Ok((*only).clone()),
        _ => {
            let offered: Vec<String> = entries
                .iter()
                .filter_map(|entry| entry.platform.as_ref())
                .take(8)
                .map(|platform| {
                    format!("{}/{}", platform.os, platform.architecture)
                        .chars()
                        .take(40)
                        .collect()
                })
                .collect();
            Err(ImageError::unsupported(
                what,
                format!(
                    "it has no image for linux/amd64 (it has: {})",
                    offered.join(", ")
                ),
            ))
        }
    }
}

/// Whether an entry is a statement about another one, as build tools add.
fn is_attestation(entry: &Descriptor) -> bool {
    let annotations = entry.annotations.as_ref();
    annotations.is_some_and(|all| all.contains_key("vnd.docker.reference.type"))
}

/// How the layer that `descriptor` names is compressed, from its media type.
pub(crate) fn compression(what: &str, descriptor: &Descriptor) -> Result<Compression, ImageError> {
    let kind = descriptor.media_type.as_str();
    let oci = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
    ];
    let docker = [
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    let after = |bases: [&str; 2]| bases.iter().find_map(|base| kind.strip_prefix(base));
    match (after(oci), after(docker)) {
        (Some(""), _) | (_, Some("")) => Ok(Compression::None),
        (Some("+gzip"), _) | (_, Some(".gzip")) => Ok(Compression::Gzip),
        (Some("+zstd"), _) | (_, Some(".zstd")) => Ok(Compression::Zstd),
        _ => {
            let kind: String = kind.chars().take(120).collect();
            let reason = format!("a layer has the type {kind:?}; use tar, tar+gzip or tar+zstd");
            Err(ImageError::unsupported(what, reason))
        }
    }
}

/// What a container of the image starts with (OCI "config.md", `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerDefaults {
    /// `user`, `uid`, `user:group` or `uid:gid`; empty for root.
    #[serde(rename = "User", default, deserialize_with = "or_default")]
    pub user: String,
    /// `NAME=value`, in order.
    #[serde(rename = "Env", default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// What is put before the command.
    #[serde(rename = "Entrypoint", default, deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The command, or the entry point's default arguments.
    #[serde(rename = "Cmd", default, deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Working directory; empty for `/`.
    #[serde(rename = "WorkingDir", default, deserialize_with = "or_default")]
    pub working_dir: String,
    /// Labels.
    #[serde(rename = "Labels", default, deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// Directories that the image wants as volumes.
    #[serde(rename = "Volumes", default, deserialize_with = "keys")]
    pub volumes: Vec<String>,
    /// Ports that the image listens on: `80/tcp`.
    #[serde(rename = "ExposedPorts", default, deserialize_with = "keys")]
    pub exposed_ports: Vec<String>,
    /// Signal that asks it to end (`SIGTERM`, `15`); empty for SIGTERM.
    #[serde(rename = "StopSignal", default, deserialize_with = "or_default")]
    pub stop_signal: String,
}

/// `null` is how Go writes an empty list or map.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A set is written as an object with empty values; in a record of our own, as a list.
fn keys<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Set {
        Object(BTreeMap<String, serde::de::IgnoredAny>),
        List(Vec<String>),
    }
    Ok(match Option::<Set>::deserialize(deserializer)? {
        None => Vec::new(),
        Some(Set::Object(map)) => map.into_keys().collect(),
        Some(Set::List(list)) => list,
    })
}

/// What is used of an image configuration.
#[derive(Debug)]
pub(crate) struct ImageDocument {
    pub defaults: ContainerDefaults,
    pub diff_ids: Vec<DiffId>,
}

impl ImageDocument {
    /// Parses a configuration whose manifest has `layers` layers, and checks its platform.
    pub(crate) fn parse(what: &str, bytes: &[u8], layers: usize) -> Result<Self, ImageError> {
        #[derive(Deserialize)]
        struct Raw {
            architecture: Option<String>,
            os: Option<String>,
            #[serde(default, deserialize_with = "or_default")]
            config: ContainerDefaults,
            rootfs: Option<RootFs>,
        }
        #[derive(Deserialize)]
        struct RootFs {
            #[serde(rename = "type")]
            kind: String,
            #[serde(default, deserialize_with = "or_default")]
            diff_ids: Vec<DiffId>,
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| {
            ImageError::corrupt(what, format!("its configuration is not valid: {error}"))
        })?;
        let platform = Platform {
            architecture: raw.architecture.unwrap_or_default(),
            os: raw.os.unwrap_or_default(),
            variant: None,
        };
        if platform.rank().is_none() {
            let name: String = format!("{}/{}", platform.os, platform.architecture)
                .chars()
                .take(60)
                .collect();
            return Err(ImageError::unsupported(
                what,
                format!("it is made for {name}, and pods run linux/amd64"),
            ));
        }
        let rootfs = raw
            .rootfs
            .ok_or_else(|| ImageError::corrupt(what, "its configuration has no rootfs"))?;
        if rootfs.kind != "layers" {
            return Err(ImageError::corrupt(
                what,
                "the rootfs of its configuration is not of the type \"layers\"",
            ));
        }
        if rootfs.diff_ids.len() != layers {
            return Err(ImageError::corrupt(
                what,
                format!(
                    "its configuration has {} diff IDs for {layers} layers",
                    rootfs.diff_ids.len()
                ),
            ));
        }
        for text in raw
            .config
            .env
            .iter()
            .chain(&raw.config.entrypoint)
            .chain(&raw.config.cmd)
        {
            if text.contains('\0') {
                return Err(ImageError::corrupt(
                    what,
                    "its configuration has a NUL character in a command or variable",
                ));
            }
        }
        Ok(Self {
            defaults: raw.config,
            diff_ids: rootfs.diff_ids,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, extra: &str) -> String {
        let digest = Digest::of(extra.as_bytes());
        format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":3{extra}}}"#)
    }

    fn manifest(layers: usize) -> String {
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar", "");
        let config = descriptor("application/vnd.oci.image.config.v1+json", "");
        format!(
            r#"{{"schemaVersion":2,"config":{config},"layers":[{}]}}"#,
            vec![layer; layers].join(",")
        )
    }

    #[test]
    fn manifest_and_its_bounds() {
        assert!(
            matches!(Document::parse("x", manifest(127).as_bytes()), Ok(Document::Manifest(m)) if m.layers.len() == 127)
        );
        // must-test: a manifest, an index or a config of absurd size or depth
        assert!(matches!(
            Document::parse("x", manifest(128).as_bytes()),
            Err(ImageError::TooLarge { .. })
        ));
        let entry = descriptor("application/vnd.oci.image.manifest.v1+json", "");
        let index = |n: usize| {
            format!(
                r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
                vec![entry.as_str(); n].join(",")
            )
        };
        assert!(matches!(
            Document::parse("x", index(1000).as_bytes()),
            Ok(Document::Index(_))
        ));
        assert!(matches!(
            Document::parse("x", index(1001).as_bytes()),
            Err(ImageError::TooLarge { .. })
        ));
        let huge = vec![b' '; MAX_MANIFEST as usize + 1];
        assert!(matches!(
            Document::parse("x", &huge),
            Err(ImageError::TooLarge { .. })
        ));
        let deep = "[".repeat(1 << 20);
        assert!(matches!(
            Document::parse("x", deep.as_bytes()),
            Err(ImageError::Corrupt { .. })
        ));
        assert!(ImageDocument::parse("x", deep.as_bytes(), 0).is_err());
    }

    #[test]
    fn a_manifest_that_is_also_an_index_is_refused() {
        let both = manifest(1).replace(
            r#""schemaVersion":2,"#,
            r#""schemaVersion":2,"manifests":[],"#,
        );
        assert!(matches!(
            Document::parse("x", both.as_bytes()),
            Err(ImageError::Corrupt { .. })
        ));
        let old = r#"{"schemaVersion":1,"fsLayers":[]}"#;
        assert!(matches!(
            Document::parse("x", old.as_bytes()),
            Err(ImageError::Unsupported { .. })
        ));
    }

    #[test]
    fn platform() {
        let entry = |os: &str, arch: &str, variant: &str| -> Descriptor {
            let extra = format!(
                r#","platform":{{"os":"{os}","architecture":"{arch}","variant":"{variant}"}}"#
            );
            serde_json::from_str(&descriptor("m", &extra)).unwrap()
        };
        let entries = [
            entry("unknown", "unknown", ""),
            entry("linux", "arm64", "v8"),
            entry("linux", "amd64", "v3"),
            entry("linux", "amd64", "v2"),
            entry("linux", "amd64", ""),
        ];
        assert_eq!(select("x", &entries).unwrap().digest, entries[4].digest);
        assert_eq!(
            select("x", &entries[..4]).unwrap().digest,
            entries[3].digest
        );
        assert!(matches!(
            select("x", &entries[..3]),
            Err(ImageError::Unsupported { .. })
        ));
        let mut attestation = entries[4].clone();
        attestation.digest = Digest::of(b"attestation");
        let kind = ("vnd.docker.reference.type", "attestation-manifest");
        attestation.annotations = Some(BTreeMap::from([(kind.0.to_owned(), kind.1.to_owned())]));
        let both = [attestation.clone(), entries[4].clone()];
        assert_eq!(select("x", &both).unwrap().digest, entries[4].digest);
        assert!(select("x", &[attestation]).is_err());
    }

    #[test]
    fn layer_types() {
        let of = |kind: &str| {
            let entry: Descriptor = serde_json::from_str(&descriptor(kind, "")).unwrap();
            (compression("x", &entry).ok(), is_foreign(&entry))
        };
        let docker = "application/vnd.docker.image.rootfs";
        let oci = "application/vnd.oci.image.layer";
        for (kind, compression, foreign) in [
            (format!("{oci}.v1.tar"), Some(Compression::None), false),
            (format!("{oci}.v1.tar+gzip"), Some(Compression::Gzip), false),
            (format!("{oci}.v1.tar+zstd"), Some(Compression::Zstd), false),
            (
                format!("{oci}.nondistributable.v1.tar"),
                Some(Compression::None),
                true,
            ),
            (
                format!("{oci}.nondistributable.v1.tar+gzip"),
                Some(Compression::Gzip),
                true,
            ),
            (
                format!("{docker}.diff.tar.gzip"),
                Some(Compression::Gzip),
                false,
            ),
            (
                format!("{docker}.foreign.diff.tar.gzip"),
                Some(Compression::Gzip),
                true,
            ),
            (format!("{oci}.v1.tar.gzip"), None, false),
            (format!("{oci}.v1.tar+encrypted"), None, false),
            ("text/html".to_owned(), None, false),
        ] {
            assert_eq!(of(&kind), (compression, foreign), "{kind}");
        }
    }

    #[test]
    fn configuration() {
        let id = Digest::of(b"");
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"User":"1:2","Env":["A=b"],"Cmd":null,"Volumes":{{"/data":{{}}}},"ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{id}"]}}}}"#
        );
        let document = ImageDocument::parse("x", text.as_bytes(), 1).unwrap();
        assert_eq!(document.defaults.volumes, ["/data"]);
        assert_eq!(document.defaults.exposed_ports, ["80/tcp"]);
        let again: ContainerDefaults =
            serde_json::from_str(&serde_json::to_string(&document.defaults).unwrap()).unwrap();
        assert_eq!(again, document.defaults);
        assert!(ImageDocument::parse("x", text.as_bytes(), 2).is_err());
        let arm = text.replace("amd64", "arm64");
        assert!(matches!(
            ImageDocument::parse("x", arm.as_bytes(), 1),
            Err(ImageError::Unsupported { .. })
        ));
    }
}
