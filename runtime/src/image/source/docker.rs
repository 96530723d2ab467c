//! Archives of `docker save`: manifest.json names a configuration and layers for each image.

use serde::Deserialize;

use super::{Files, Found, Location};
use crate::image::digest::Digest;
use crate::image::document::{ImageDocument, MAX_CONFIG, MAX_LAYERS, MAX_MANIFEST};
use crate::image::error::ImageError;
use crate::image::layer::LayerSpec;
use crate::image::reference::Reference;

/// An image of an archive, with its names.
type Named = (Found, Vec<Reference>);

/// Most images in an archive.
const MAX_IMAGES: usize = 1000;

#[derive(Deserialize)]
struct Item {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

/// The images of the archive with their names; `None` if it is not one of `docker save`.
pub(in crate::image) fn docker_images(files: &Files) -> Result<Option<Vec<Named>>, ImageError> {
    // Of a directory, manifest.json could name any file of the host.
    let Files::Archive(_) = files else {
        return Ok(None);
    };
    let what = files.path().display().to_string();
    let Some(manifest) = files.read("manifest.json", MAX_MANIFEST)? else {
        return Ok(None);
    };
    let items: Vec<Item> = serde_json::from_slice(&manifest).map_err(|error| {
        ImageError::corrupt(&*what, format!("its manifest.json is not valid: {error}"))
    })?;
    if items.is_empty() {
        return Err(ImageError::corrupt(
            what,
            "its manifest.json names no image",
        ));
    }
    if items.len() > MAX_IMAGES {
        return Err(ImageError::too_large(
            what,
            format!("it has more than {MAX_IMAGES} images"),
        ));
    }
    items
        .into_iter()
        .map(|item| image(files, &what, item))
        .collect::<Result<_, _>>()
        .map(Some)
}

fn image(files: &Files, what: &str, item: Item) -> Result<Named, ImageError> {
    let layers = item.layers.unwrap_or_default();
    if layers.len() > MAX_LAYERS {
        return Err(ImageError::too_large(
            what,
            format!(
                "it has {} layers, and {MAX_LAYERS} is the limit",
                layers.len()
            ),
        ));
    }
    let config = files
        .read(&item.config, MAX_CONFIG)?
        .ok_or_else(|| files.missing(&item.config))?;
    let document = ImageDocument::parse(what, &config, layers.len())?;
    let layers = layers
        .into_iter()
        .zip(&document.diff_ids)
        .map(|(name, diff_id)| {
            (
                LayerSpec {
                    blob: None,
                    compression: None,
                    diff_id: *diff_id,
                },
                Location::Member(name),
            )
        })
        .collect();
    let names = item
        .tags
        .unwrap_or_default()
        .iter()
        .map(|tag| tag.parse())
        .collect::<Result<_, _>>()?;
    let config = (Digest::of(&config), config);
    Ok((
        Found {
            what: what.to_owned(),
            digest: None,
            manifests: Vec::new(),
            config,
            document,
            layers,
        },
        names,
    ))
}
