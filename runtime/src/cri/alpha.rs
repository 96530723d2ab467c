//! CRI v1alpha2: its messages have v1's field numbers, so a request for it is one for v1 at another path.

use std::task::{Context, Poll};

use http::uri::PathAndQuery;
use http::{Request, Uri};
use tower::{Layer, Service};

const OLD: &str = "/runtime.v1alpha2.";
const NEW: &str = "/runtime.v1.";

/// Puts [`V1Alpha2`] around a service.
#[derive(Clone, Copy, Debug, Default)]
pub struct V1Alpha2Layer;

impl<S> Layer<S> for V1Alpha2Layer {
    type Service = V1Alpha2<S>;

    fn layer(&self, inner: S) -> Self::Service {
        V1Alpha2 { inner }
    }
}

/// Hands requests for `/runtime.v1alpha2.X/Y` on as requests for `/runtime.v1.X/Y`.
#[derive(Clone, Debug)]
pub struct V1Alpha2<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for V1Alpha2<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if let Some(uri) = rewritten(request.uri()) {
            *request.uri_mut() = uri;
        }
        self.inner.call(request)
    }
}

fn rewritten(uri: &Uri) -> Option<Uri> {
    let rest = uri.path_and_query()?.as_str().strip_prefix(OLD)?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(format!("{NEW}{rest}")).ok();
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_v1alpha2_is_rewritten() {
        let path = |uri: &str| rewritten(&uri.parse().unwrap()).map(|uri| uri.to_string());
        assert_eq!(
            path("/runtime.v1alpha2.RuntimeService/Version").as_deref(),
            Some("/runtime.v1.RuntimeService/Version")
        );
        assert_eq!(
            path("http://localhost/runtime.v1alpha2.ImageService/ListImages").as_deref(),
            Some("http://localhost/runtime.v1.ImageService/ListImages")
        );
        assert_eq!(path("/runtime.v1.RuntimeService/Version"), None);
        assert_eq!(path("/caisson.cli.v1.Cli/Exec"), None);
    }
}
