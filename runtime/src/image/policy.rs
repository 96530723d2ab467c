//! Registries whose images must be signed: cosign's signatures with a public key.
//!
//! cosign keeps the signatures of the image `sha256:HEX` in its repository, under the tag `sha256-HEX.sig`: a manifest
//! each of whose layers is a signed statement ("simple signing", JSON), with the signature over it in an annotation.
//! One good signature is enough. The statement names the digest and the repository, so that no signature holds
//! for another image, or for this one elsewhere.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde::Deserialize;

use super::digest::Digest;
use super::document::{Descriptor, Document};
use super::error::ImageError;
use super::reference::Reference;
use super::source::registry::Session;

/// The type of a signed statement.
const STATEMENT: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The annotation that holds the signature.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// Largest statement, in bytes.
const MAX_STATEMENT: u64 = 64 << 10;
/// Most signatures of an image that are looked at.
const MAX_SIGNATURES: usize = 32;
/// Largest file of a key, in bytes.
const MAX_KEY_FILE: u64 = 64 << 10;
/// What stands before the point in the DER form of a P-256 public key (RFC 5480).
const P256_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// Images of a registry, or below a path in it, must be signed with a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `host`, or `host/path`.
    scope: String,
    /// The point of the curve.
    key: Vec<u8>,
    /// What the key is known by: the digest of its DER form.
    key_id: Digest,
}

impl Policy {
    /// The policy for `registry` (`host`, `host:port`, or `host/path`), with the public key in a PEM file, as
    /// `cosign generate-key-pair` writes it: ECDSA on P-256.
    ///
    /// # Errors
    /// [`ImageError::Disk`] for a file that cannot be read, [`ImageError::Unsupported`] for another kind of key or a
    /// registry that is no name.
    pub fn load(registry: &str, key_file: &Path) -> Result<Self, ImageError> {
        let wrong = |what: &str, reason: &str| {
            let what = format!("the signature policy's {what}");
            Err(ImageError::unsupported(what, reason))
        };
        let scope = registry.trim_end_matches('/');
        // A scope with a name behind it must be a reference.
        let whole: Result<Reference, _> = format!("{scope}/x").parse();
        let scope = match whole {
            Ok(whole) if whole.name() == format!("{scope}/x") => scope.to_owned(),
            Ok(whole) if scope == "index.docker.io" => whole.host().to_owned(),
            _ => {
                return wrong(
                    &format!("registry {registry:?}"),
                    "write a host or a host with a path, such as docker.io/library",
                );
            }
        };
        let disk = |error| ImageError::disk("read", key_file, error);
        if fs::metadata(key_file).map_err(disk)?.len() > MAX_KEY_FILE {
            return wrong(
                &format!("key {}", key_file.display()),
                "it is larger than 64 KiB",
            );
        }
        let pem = fs::read_to_string(key_file).map_err(disk)?;
        let der = from_pem(&pem);
        let key = der
            .as_deref()
            .and_then(|der| der.strip_prefix(&P256_PREFIX));
        match (key, &der) {
            (Some(key), Some(der)) if key.len() == 65 && key[0] == 4 => Ok(Self {
                scope,
                key: key.to_vec(),
                key_id: Digest::of(der),
            }),
            _ => wrong(
                &format!("key {}", key_file.display()),
                "it is no ECDSA P-256 public key in PEM, as `cosign generate-key-pair` writes it",
            ),
        }
    }

    /// What the key is known by.
    pub(super) fn key_id(&self) -> Digest {
        self.key_id
    }

    fn covers(&self, reference: &Reference) -> bool {
        let name = reference.name();
        name.strip_prefix(&self.scope)
            .is_some_and(|rest| rest.starts_with('/') || rest.is_empty())
    }

    /// Makes sure that the image with `digest` is signed for this reference's repository.
    ///
    /// # Errors
    /// [`ImageError::Untrusted`] with the reason, and those of the registry.
    pub(super) async fn verify(
        &self,
        session: &Session,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<(), ImageError> {
        let refuse = |reason: String| {
            Err(ImageError::Untrusted {
                what: reference.to_string(),
                reason,
            })
        };
        let tag = format!("sha256-{}.sig", digest.hex());
        let (_, bytes) = match session.manifest(&tag).await {
            Err(ImageError::NotFound { .. }) => {
                return refuse(format!("it has no signature: there is no tag {tag}"));
            }
            found => found?,
        };
        let manifest = match Document::parse(&tag, &bytes) {
            Ok(Document::Manifest(manifest)) => manifest,
            Ok(Document::Index(_)) => return refuse("its signatures are an index".to_owned()),
            Err(error) => return refuse(format!("its signatures cannot be read: {error}")),
        };
        let mut reason = "its signatures are none of cosign's".to_owned();
        let statements = manifest
            .layers
            .iter()
            .filter(|layer| layer.media_type == STATEMENT);
        for layer in statements.take(MAX_SIGNATURES) {
            if layer.size > MAX_STATEMENT {
                reason = "a signed statement is larger than 64 KiB".to_owned();
                continue;
            }
            let statement = session.small(layer).await?;
            match self.check(layer, &statement, reference, digest) {
                Ok(()) => return Ok(()),
                Err(why) => reason = why,
            }
        }
        refuse(reason)
    }

    /// Checks one signature, then what it says.
    fn check(
        &self,
        layer: &Descriptor,
        statement: &[u8],
        reference: &Reference,
        digest: &Digest,
    ) -> Result<(), String> {
        let signature = layer
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(SIGNATURE))
            .and_then(|signature| STANDARD.decode(signature.trim()).ok())
            .ok_or("a signature is missing, or is not base64")?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.key)
            .verify(statement, &signature)
            .map_err(|_| "its signature is not one of the configured key".to_owned())?;
        let statement: Statement = serde_json::from_slice(statement)
            .map_err(|error| format!("its signed statement cannot be read: {error}"))?;
        let critical = statement.critical;
        if critical.kind != "cosign container image signature" {
            return Err(format!(
                "the signature is for something else: {:?}",
                critical.kind
            ));
        }
        if critical.image.digest != *digest {
            return Err(format!("the signature is for {}", critical.image.digest));
        }
        let name = &critical.identity.reference;
        match name.parse::<Reference>() {
            Ok(signed) if signed.name() == reference.name() => Ok(()),
            _ => Err(format!("the signature is for the repository {name:?}")),
        }
    }
}

/// What is signed.
#[derive(Deserialize)]
struct Statement {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Identity {
    #[serde(rename = "docker-reference")]
    reference: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: Digest,
}

/// The policy for a reference: of those that cover it, the one that says most.
pub(super) fn policy_for<'a>(policies: &'a [Policy], reference: &Reference) -> Option<&'a Policy> {
    policies
        .iter()
        .filter(|policy| policy.covers(reference))
        .max_by_key(|policy| policy.scope.len())
}

/// The content of the first `PUBLIC KEY` block.
fn from_pem(pem: &str) -> Option<Vec<u8>> {
    let (_, rest) = pem.split_once("-----BEGIN PUBLIC KEY-----")?;
    let (body, _) = rest.split_once("-----END PUBLIC KEY-----")?;
    let text: String = body.split_whitespace().collect();
    STANDARD.decode(text).ok()
}

#[cfg(test)]
pub(super) mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

    use super::*;

    /// A key that signs, as cosign does.
    pub(crate) struct Signer(EcdsaKeyPair);

    impl Signer {
        pub(crate) fn new() -> Self {
            let random = SystemRandom::new();
            let document =
                EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
            let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
            Self(EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap())
        }

        pub(crate) fn pem(&self) -> String {
            let der = [&P256_PREFIX, self.0.public_key().as_ref()].concat();
            format!(
                "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
                STANDARD.encode(der)
            )
        }

        pub(crate) fn policy(&self, registry: &str) -> Policy {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), self.pem()).unwrap();
            Policy::load(registry, file.path()).unwrap()
        }

        /// A statement and its signature, in base64.
        pub(crate) fn sign(&self, repository: &str, digest: &Digest) -> (Vec<u8>, String) {
            let statement = serde_json::json!({
                "critical": {
                    "identity": {"docker-reference": repository},
                    "image": {"docker-manifest-digest": digest},
                    "type": "cosign container image signature",
                },
                "optional": null,
            });
            let statement = statement.to_string().into_bytes();
            let signature = self.0.sign(&SystemRandom::new(), &statement).unwrap();
            (statement, STANDARD.encode(signature))
        }
    }

    fn layer(signature: &str) -> Descriptor {
        serde_json::from_value(serde_json::json!({
            "mediaType": STATEMENT, "digest": Digest::of(b""), "size": 1,
            "annotations": {SIGNATURE: signature},
        }))
        .unwrap()
    }

    #[test]
    fn what_a_signature_holds_for() {
        let signer = Signer::new();
        let policy = signer.policy("reg.example/team");
        let digest = Digest::of(b"image");
        let reference: Reference = "reg.example/team/app:v1".parse().unwrap();
        let check = |repository: &str, of: &Digest, by: &Signer| {
            let (statement, signature) = by.sign(repository, of);
            policy.check(&layer(&signature), &statement, &reference, &digest)
        };
        assert_eq!(check("reg.example/team/app", &digest, &signer), Ok(()));
        for (result, part) in [
            (
                check("reg.example/team/other", &digest, &signer),
                "repository",
            ),
            (check("../x", &digest, &signer), "repository"),
            (
                check("reg.example/team/app", &Digest::of(b"other"), &signer),
                "is for sha256:",
            ),
            (
                check("reg.example/team/app", &digest, &Signer::new()),
                "configured key",
            ),
        ] {
            assert!(result.clone().unwrap_err().contains(part), "{result:?}");
        }
        let (mut statement, signature) = signer.sign("reg.example/team/app", &digest);
        statement.push(b' ');
        assert!(
            policy
                .check(&layer(&signature), &statement, &reference, &digest)
                .is_err()
        );
        for signature in ["", "!", "AAAA"] {
            assert!(
                policy
                    .check(&layer(signature), &statement, &reference, &digest)
                    .is_err()
            );
        }
    }

    #[test]
    fn what_a_policy_covers() {
        let signer = Signer::new();
        let policies = [
            signer.policy("reg.example"),
            signer.policy("reg.example/team"),
            signer.policy("index.docker.io"),
        ];
        let found = |name: &str| {
            let reference: Reference = name.parse().unwrap();
            policy_for(&policies, &reference).map(|policy| policy.scope.clone())
        };
        assert_eq!(found("reg.example/a").as_deref(), Some("reg.example"));
        assert_eq!(
            found("reg.example/team/a").as_deref(),
            Some("reg.example/team")
        );
        assert_eq!(found("reg.example/teams/a").as_deref(), Some("reg.example"));
        assert_eq!(found("busybox").as_deref(), Some("docker.io"));
        assert_eq!(found("reg.example.org/a"), None);
        assert_eq!(found("reg.example:80/a"), None);
    }

    #[test]
    fn keys_and_names_that_are_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let good = Signer::new().pem();
        for registry in [
            "",
            "team",
            "reg.example/TEAM",
            "reg.example/a:v1",
            "https://reg.example",
        ] {
            fs::write(file.path(), &good).unwrap();
            assert!(Policy::load(registry, file.path()).is_err(), "{registry:?}");
        }
        let rsa = "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n-----END PUBLIC KEY-----\n";
        for text in ["", "-----BEGIN PUBLIC KEY-----", rsa] {
            fs::write(file.path(), text).unwrap();
            let error = Policy::load("reg.example", file.path()).unwrap_err();
            assert!(error.to_string().contains("P-256"), "{error}");
        }
        assert!(Policy::load("reg.example", Path::new("/nonexistent")).is_err());
    }
}
