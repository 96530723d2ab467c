//! One input of the fuzz targets that concern images: a layer, or documents about one.

use super::digest::Digest;
use super::document::{Document, ImageDocument, MAX_LAYERS, compression, select};
use super::reference::Reference;
use super::source::registry;

/// A layer.
pub fn layer(blob: &[u8]) {
    super::layer::fuzzing::layer(blob);
}

/// A registry's hosts.toml; the sentence of what is wrong with it.
pub(crate) fn hosts(text: &str) -> Option<String> {
    registry::fuzz_hosts(text)
}

/// A manifest or an index, a configuration, a name, or a registry's challenge.
pub fn image_documents(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    match kind % 4 {
        0 => match Document::parse("fuzz", bytes) {
            Ok(Document::Manifest(manifest)) => {
                assert!(manifest.layers.len() <= MAX_LAYERS);
                for layer in &manifest.layers {
                    let _ = compression("fuzz", layer);
                }
            }
            Ok(Document::Index(entries)) => {
                if let Ok(chosen) = select("fuzz", &entries) {
                    assert!(entries.iter().any(|entry| entry.digest == chosen.digest));
                }
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        },
        1 => {
            let (count, bytes) = bytes.split_first().unwrap_or((&0, &[]));
            let layers = usize::from(*count);
            if let Ok(document) = ImageDocument::parse("fuzz", bytes, layers) {
                assert_eq!(document.diff_ids.len(), layers);
                // A record of ours is made of it, which must be read again as it was.
                let defaults = document.defaults;
                let record = serde_json::to_vec(&defaults).expect("a record");
                let again = serde_json::from_slice(&record).expect("a record of ours");
                assert_eq!(defaults, again);
            }
        }
        2 => {
            let Ok(text) = std::str::from_utf8(bytes) else {
                return;
            };
            if let Ok(reference) = text.parse::<Reference>() {
                let again = reference.to_string().parse::<Reference>();
                assert_eq!(again.expect("a name of ours"), reference);
                assert!(!reference.name().contains(".."), "{reference}");
            }
            if let Ok(digest) = text.parse::<Digest>() {
                assert_eq!(digest.to_string(), text);
            }
        }
        _ => {
            if let Ok(text) = std::str::from_utf8(bytes) {
                registry::fuzz_challenge(text);
            }
        }
    }
}
