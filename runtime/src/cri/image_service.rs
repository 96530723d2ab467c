//! `runtime.v1.ImageService`.

use std::collections::HashSet;
use std::sync::Arc;

use caisson_proto::cri;
use cri::image_service_server::ImageService;
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};

use super::registry::now;
use super::{Context, CriError, detached};
use crate::image::{Auth, DiffId, Image, ImageError, Reference};
use crate::usage;

type Answer<T> = Result<Response<T>, Status>;

impl From<ImageError> for CriError {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            ImageError::NotFound { .. } => Code::NotFound,
            ImageError::InvalidReference { .. } | ImageError::Ambiguous { .. } => {
                Code::InvalidArgument
            }
            ImageError::Unauthorized { .. } => Code::PermissionDenied,
            ImageError::TooLarge { .. } | ImageError::DiskFull { .. } => Code::ResourceExhausted,
            ImageError::Unsupported { .. } => Code::Unimplemented,
            ImageError::Corrupt { .. } | ImageError::Changed { .. } => Code::DataLoss,
            ImageError::Registry { .. } | ImageError::Stalled { .. } => Code::Unavailable,
            // The kubelet takes an unknown code off the message and looks at how that begins.
            ImageError::Untrusted { .. } => Code::Unknown,
            ImageError::Cancelled { .. } => Code::Cancelled,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

/// The service.
pub struct Service {
    context: Arc<Context>,
}

impl Service {
    /// The service on this context.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

/// The layers that containers are made of, which must not go while those are there.
pub fn layers_in_use(context: &Context) -> HashSet<DiffId> {
    context
        .registry
        .containers()
        .iter()
        .flat_map(|container| container.record().layers.clone())
        .filter_map(|layer| layer.parse().ok())
        .collect()
}

/// Credentials as a client gives them (CRI `AuthConfig`), for an image. Those for another server are none.
///
/// # Errors
/// INVALID_ARGUMENT for ones that cannot be read.
fn auth(auth: cri::AuthConfig, image: &str) -> Result<Option<Auth>, CriError> {
    if !auth.server_address.is_empty() {
        let image: Reference = image.parse()?;
        if !image.is_at(&auth.server_address) {
            tracing::debug!(%image, server = auth.server_address, "credentials are for another server");
            return Ok(None);
        }
    }
    if !auth.registry_token.is_empty() {
        return Ok(Some(Auth::Bearer(auth.registry_token)));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Auth::Identity(auth.identity_token)));
    }
    if !auth.username.is_empty() {
        return Ok(Some(Auth::Basic {
            username: auth.username,
            password: auth.password,
        }));
    }
    if auth.auth.is_empty() {
        return Ok(None);
    }
    Auth::from_encoded(&auth.auth)
        .map(Some)
        .map_err(|error| CriError::invalid(error.to_string()))
}

/// What there is to know of an image. `imageSpec` is what clients of containerd look for.
async fn details(context: &Context, image: &Image) -> Result<serde_json::Value, CriError> {
    let layers: Vec<_> = image
        .layers
        .iter()
        .map(|layer| {
            let path = context.images.layer_path(layer);
            serde_json::json!({ "diffID": layer, "path": path })
        })
        .collect();
    Ok(serde_json::json!({
        "id": image.id,
        "repoTags": image.repo_tags,
        "repoDigests": image.repo_digests,
        "size": image.size,
        "pinned": image.pinned,
        "layers": layers,
        "imageSpec": context.images.configuration(image).await?,
    }))
}

fn name_of(spec: Option<cri::ImageSpec>) -> Result<String, CriError> {
    spec.map(|spec| spec.image)
        .filter(|name| !name.is_empty())
        .ok_or_else(|| CriError::invalid("the request names no image"))
}

/// An image as the interface shows it.
pub fn item(image: &Image) -> cri::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<u32>() {
        Ok(uid) => (
            Some(cri::Int64Value {
                value: i64::from(uid),
            }),
            String::new(),
        ),
        // No user is root; the kubelet's runAsNonRoot goes by this.
        Err(_) if user.is_empty() => (Some(cri::Int64Value { value: 0 }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: Some(cri::ImageSpec {
            image: image
                .repo_tags
                .first()
                .or(image.repo_digests.first())
                .unwrap_or(&image.id)
                .clone(),
            ..Default::default()
        }),
        pinned: image.pinned,
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let asked = request
            .into_inner()
            .filter
            .and_then(|filter| filter.image)
            .map(|spec| spec.image)
            .filter(|name| !name.is_empty());
        let images = match asked {
            Some(name) => self
                .context
                .images
                .find(&name)
                .await
                .map_err(CriError::from)?
                .into_iter()
                .collect(),
            None => self.context.images.list().await.map_err(CriError::from)?,
        };
        Ok(Response::new(cri::ListImagesResponse {
            images: images.iter().map(item).collect(),
        }))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let name = name_of(request.image)?;
        let image = self
            .context
            .images
            .get(&name)
            .await
            .map_err(CriError::from)?;
        let mut info = std::collections::HashMap::new();
        if let Some(image) = image.as_ref().filter(|_| request.verbose) {
            let details = details(&self.context, image).await?;
            info.insert("info".to_owned(), details.to_string());
        }
        // An image that is not there is an empty answer, not an error.
        Ok(Response::new(cri::ImageStatusResponse {
            image: image.as_ref().map(item),
            info,
        }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = name_of(request.image)?;
        let auth = request
            .auth
            .map(|given| auth(given, &name))
            .transpose()?
            .flatten();
        let context = self.context.clone();
        let image =
            detached(async move { Ok(context.images.pull(&name, auth, |_| {}).await?) }).await?;
        Ok(Response::new(cri::PullImageResponse {
            image_ref: image.id,
        }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let name = name_of(request.into_inner().image)?;
        let context = self.context.clone();
        detached(async move {
            let using = context.clone();
            let removed = context
                .images
                .remove(&name, move || layers_in_use(&using))
                .await;
            match removed {
                Ok(_) | Err(ImageError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            }
        })
        .await?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let info = self
            .context
            .images
            .fs_info()
            .await
            .map_err(CriError::from)?;
        let root = self.context.config.root.clone();
        let written = tokio::task::spawn_blocking(move || {
            usage::below(&[&root.join("pods"), &root.join("scratch")])
        })
        .await
        .map_err(|error| CriError::internal(format!("the disk cannot be measured: {error}")))?;
        let value = |value| Some(cri::UInt64Value { value });
        // One path for both: the kubelet takes two for two disks.
        let usage = |used: u64, inodes: u64| cri::FilesystemUsage {
            timestamp: now(),
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: info.path.display().to_string(),
            }),
            used_bytes: value(used),
            inodes_used: value(inodes),
        };
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![usage(info.used_bytes, info.inodes)],
            container_filesystems: vec![usage(written.bytes, written.inodes)],
        }))
    }

    async fn stream_images(
        &self,
        _: Request<cri::StreamImagesRequest>,
    ) -> Answer<BoxStream<cri::StreamImagesResponse>> {
        Err(CriError::unimplemented(
            "StreamImages is not part of this release of Caisson; use ListImages",
        )
        .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials() {
        let auth = |given| auth(given, "reg.example/app");
        let none = cri::AuthConfig::default();
        assert!(auth(none).unwrap().is_none());
        let encoded = cri::AuthConfig {
            auth: "dXNlcjpwYTpzcw==".into(), // user:pa:ss
            ..Default::default()
        };
        assert!(matches!(
            auth(encoded).unwrap(),
            Some(Auth::Basic { username, password }) if username == "user" && password == "pa:ss"
        ));
        let broken = cri::AuthConfig {
            auth: "!".into(),
            ..Default::default()
        };
        assert_eq!(auth(broken).unwrap_err().code, Code::InvalidArgument);
        for (server, taken) in [
            ("reg.example", true),
            ("https://reg.example/v2/", true),
            ("other.example", false),
            ("https://index.docker.io/v1/", false),
        ] {
            let given = cri::AuthConfig {
                username: "user".into(),
                server_address: server.into(),
                ..Default::default()
            };
            assert_eq!(auth(given).unwrap().is_some(), taken, "{server}");
        }
    }
}
