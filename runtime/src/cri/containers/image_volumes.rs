//! Image volumes: mounts whose content is an image (KEP-4639).

use std::path::{Component, Path};

use caisson_proto::{agent, cri};

use super::super::{Context, CriError};
use super::create::share_layers;
use crate::image::Image;
use crate::sandbox::Sandbox;

/// Where the agent has the image volumes of its containers.
const AGENT_PATH: &str = "/run/caisson/volumes";

/// Whether a mount is an image volume.
pub fn is_image(mount: &cri::Mount) -> bool {
    mount
        .image
        .as_ref()
        .is_some_and(|spec| !spec.image.is_empty())
}

/// Finds the images of all image volumes, in their order, and notes in the mounts which they are (KEP-5365).
///
/// # Errors
/// INVALID_ARGUMENT for a mount that is not possible; NOT_FOUND for an image that is not here.
pub async fn find(context: &Context, mounts: &mut [cri::Mount]) -> Result<Vec<Image>, CriError> {
    let mut images = Vec::new();
    for mount in mounts {
        check(mount)?;
        let Some(spec) = mount.image.as_mut().filter(|spec| !spec.image.is_empty()) else {
            continue;
        };
        let image = context.images.get(&spec.image).await?.ok_or_else(|| {
            CriError::new(
                tonic::Code::NotFound,
                format!(
                    "the image {} of the mount at {} is not on this node; pull it first",
                    spec.image, mount.container_path
                ),
            )
        })?;
        spec.image_ref.clone_from(&image.id);
        images.push(image);
    }
    Ok(images)
}

fn check(mount: &cri::Mount) -> Result<(), CriError> {
    let invalid = |why: &str| {
        Err(CriError::invalid(format!(
            "the mount at {} {why}",
            mount.container_path
        )))
    };
    if !is_image(mount) {
        if !mount.image_sub_path.is_empty() {
            return invalid("has an image_sub_path and no image");
        }
        return Ok(());
    }
    if !mount.host_path.is_empty() {
        return invalid("has both an image and a host path");
    }
    if !mount.readonly {
        return invalid("has an image, and images are read-only; set readonly");
    }
    if mount.propagation() != cri::MountPropagation::PropagationPrivate {
        return invalid("has an image, where nothing propagates; use PROPAGATION_PRIVATE");
    }
    let plain = Path::new(&mount.image_sub_path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain || mount.image_sub_path.contains('\0') {
        return invalid("has an image_sub_path that is not relative or contains ..");
    }
    Ok(())
}

/// Shows the images to the agent, in the order of [`find`].
///
/// # Errors
/// The first that cannot be shown.
pub async fn share(
    context: &Context,
    sandbox: &dyn Sandbox,
    mounts: &[cri::Mount],
    images: &[Image],
) -> Result<Vec<agent::ImageVolume>, CriError> {
    let mut all = Vec::with_capacity(images.len());
    for (mount, image) in mounts.iter().filter(|mount| is_image(mount)).zip(images) {
        all.push(agent::ImageVolume {
            layers: share_layers(context, sandbox, image).await?,
            sub_path: mount.image_sub_path.clone(),
        });
    }
    Ok(all)
}

/// Where the agent has the image volume of this number.
pub fn place(container_id: &str, number: usize) -> String {
    format!("{AGENT_PATH}/{container_id}/{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_volume_cannot_be_is_refused() {
        let good = cri::Mount {
            container_path: "/data".into(),
            readonly: true,
            image: Some(cri::ImageSpec {
                image: "x".into(),
                ..Default::default()
            }),
            image_sub_path: "a/./b".into(),
            ..Default::default()
        };
        check(&good).unwrap();
        type Change = fn(&mut cri::Mount);
        let changes: [(Change, &str); 6] = [
            (|m| m.readonly = false, "readonly"),
            (|m| m.host_path = "/x".into(), "host path"),
            (|m| m.image_sub_path = "../x".into(), "image_sub_path"),
            (|m| m.image_sub_path = "/x".into(), "image_sub_path"),
            (|m| m.propagation = 1, "PROPAGATION_PRIVATE"),
            (|m| m.image = None, "no image"),
        ];
        for (change, part) in changes {
            let mut mount = good.clone();
            change(&mut mount);
            let error = check(&mount).unwrap_err();
            assert_eq!(error.code, tonic::Code::InvalidArgument);
            assert!(error.message.contains(part), "{error}");
        }
    }
}
