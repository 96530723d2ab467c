//! The index of an OCI layout (OCI "image-layout.md"): which images it has, and what they are called.

use super::{Files, Source};
use crate::image::document::{Descriptor, Document, MAX_MANIFEST, select};
use crate::image::error::ImageError;
use crate::image::reference::Reference;

/// An image of a layout: its top descriptor, and its name if it has one.
type Named = (Descriptor, Option<Reference>);

/// The images of a layout. Entries for other platforms are passed over; entries without any name that differ in
/// their platform alone are one image.
pub(in crate::image) fn oci_images(
    files: &Files,
    name: Option<&Reference>,
) -> Result<Option<Vec<Named>>, ImageError> {
    let what = files.path().display().to_string();
    let Some(layout) = files.read("oci-layout", 4096)? else {
        return Ok(None);
    };
    #[derive(serde::Deserialize)]
    struct Layout {
        #[serde(rename = "imageLayoutVersion")]
        version: String,
    }
    let layout: Layout = serde_json::from_slice(&layout).map_err(|error| {
        ImageError::corrupt(&*what, format!("its file oci-layout is not valid: {error}"))
    })?;
    if !layout.version.starts_with("1.") {
        return Err(ImageError::unsupported(what, "its layout version is not 1"));
    }
    let index = files
        .read("index.json", MAX_MANIFEST)?
        .ok_or_else(|| files.missing("index.json"))?;
    let Document::Index(entries) = Document::parse(&what, &index)? else {
        return Err(ImageError::corrupt(what, "its index.json is not an index"));
    };
    if entries.is_empty() {
        return Err(ImageError::corrupt(what, "its index.json names no image"));
    }
    let names: Vec<Option<Reference>> = entries
        .iter()
        .map(|entry| entry_name(entry, name))
        .collect();
    if names.iter().all(Option::is_none) && entries.iter().all(|entry| entry.platform.is_some()) {
        return Ok(Some(vec![(select(&what, &entries)?, name.cloned())]));
    }
    let mut images: Vec<Named> = Vec::new();
    for (entry, found) in entries.iter().zip(names) {
        let foreign =
            entry.platform.is_some() && select(&what, std::slice::from_ref(entry)).is_err();
        if !foreign {
            images.push((entry.clone(), found));
        }
    }
    match (name, images.len()) {
        (_, 0) => Err(ImageError::unsupported(
            what,
            "it has no image for linux/amd64",
        )),
        (Some(name), 1) => Ok(Some(
            images
                .into_iter()
                .map(|(entry, _)| (entry, Some(name.clone())))
                .collect(),
        )),
        (Some(name), _) => {
            // Several images, and a name was asked for: the one that has it.
            let chosen: Vec<Named> = images
                .into_iter()
                .filter(|(_, found)| found.as_ref() == Some(name))
                .collect();
            if chosen.is_empty() {
                return Err(ImageError::NotFound {
                    what: name.to_string(),
                    place: what,
                });
            }
            Ok(Some(chosen))
        }
        (None, _) => Ok(Some(images)),
    }
}

/// A full name that the entry carries. A bare tag says nothing without a name, so that it combines with the wanted one.
fn entry_name(entry: &Descriptor, wanted: Option<&Reference>) -> Option<Reference> {
    let annotations = entry.annotations.as_ref()?;
    if let Some(name) = annotations.get("io.containerd.image.name") {
        return name.parse().ok();
    }
    let name = annotations.get("org.opencontainers.image.ref.name")?;
    if name.contains(['/', ':']) {
        return name.parse().ok();
    }
    let tagged = wanted.map(|wanted| format!("{}:{name}", wanted.name()));
    tagged.and_then(|tagged| tagged.parse().ok())
}

impl Source {
    /// The document that a layout's entry leads to.
    pub(in crate::image) async fn top(
        &self,
        what: &str,
        entry: &Descriptor,
    ) -> Result<Vec<u8>, ImageError> {
        self.small(what, entry, MAX_MANIFEST).await
    }
}
