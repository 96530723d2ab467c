//! The steps of a pod's start as spans for OpenTelemetry, where a collector is configured.
//!
//! They are the steps of `caisson timeline`. A caller that has a trace of its own, as a kubelet with tracing has, names it
//! in the request's metadata (W3C Trace Context, `traceparent`), and a pod's start is a part of that trace.

use std::time::Duration;

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tonic::metadata::MetadataMap;

use crate::store::SandboxRecord;
use crate::timings::Timings;

/// How long a collector may take to receive spans.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Spans on their way to a collector. They are sent by a thread of their own, some at a time; a collector that is not there
/// costs the spans, which the log says, and nothing else.
pub struct Telemetry {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Telemetry {
    /// To the collector at this address (OTLP over gRPC). Needs a tokio runtime, which must outlive it.
    ///
    /// # Errors
    /// The address is none.
    pub fn new(endpoint: &str) -> Result<Self, ExporterBuildError> {
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let resource = Resource::builder()
            .with_service_name("caisson")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("caisson");
        Ok(Self { provider, tracer })
    }

    /// Tells of the start of a pod, which has just ended, with an error or without.
    pub fn pod_started(
        &self,
        caller: &Caller,
        pod: &SandboxRecord,
        timings: &Timings,
        error: Option<&str>,
    ) {
        let now = timings.elapsed();
        let began = timings.began_at();
        let root = self
            .tracer
            .span_builder("RunPodSandbox")
            .with_start_time(began)
            .with_attributes(attributes(pod))
            .start_with_context(&self.tracer, &caller.0);
        let context = caller.0.with_span(root);
        for step in timings.steps() {
            let mut span = self
                .tracer
                .span_builder(step.name)
                .with_start_time(began + step.start)
                .start_with_context(&self.tracer, &context);
            span.end_with_timestamp(began + step.start + step.duration);
        }
        let root = context.span();
        if let Some(error) = error {
            root.set_status(Status::error(error.to_owned()));
        }
        root.end_with_timestamp(began + now);
    }

    /// Sends what has not been sent yet, and ends.
    pub fn shut_down(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::warn!(%error, "the last spans could not be sent to the collector");
        }
    }
}

/// Attributes by OpenTelemetry's semantic conventions (`k8s.*`), and of our own.
fn attributes(pod: &SandboxRecord) -> Vec<KeyValue> {
    let metadata = pod.config.0.metadata.clone().unwrap_or_default();
    vec![
        KeyValue::new("k8s.pod.name", metadata.name),
        KeyValue::new("k8s.pod.uid", metadata.uid),
        KeyValue::new("k8s.namespace.name", metadata.namespace),
        KeyValue::new("caisson.pod.id", pod.id.clone()),
        KeyValue::new("caisson.handler", pod.handler.clone()),
    ]
}

/// The trace that a request is a part of, if its caller has one.
#[derive(Clone, Debug, Default)]
pub struct Caller(Context);

impl Caller {
    /// What the metadata says.
    pub fn of(metadata: &MetadataMap) -> Self {
        Self(TraceContextPropagator::new().extract(&Headers(metadata)))
    }
}

struct Headers<'a>(&'a MetadataMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        let keys = self.0.keys();
        keys.filter_map(|key| match key {
            tonic::metadata::KeyRef::Ascii(key) => Some(key.as_str()),
            tonic::metadata::KeyRef::Binary(_) => None,
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
        TraceService, TraceServiceServer,
    };
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
    };
    use opentelemetry_proto::tonic::trace::v1::Span as Received;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response};

    use super::*;
    use crate::store::tests::sandbox;

    #[derive(Clone, Default)]
    struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, tonic::Status> {
            self.0.lock().unwrap().push(request.into_inner());
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    impl Collector {
        async fn serve(&self) -> String {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tonic::transport::Server::builder()
                .add_service(TraceServiceServer::new(self.clone()))
                .serve_with_incoming(TcpListenerStream::new(listener));
            tokio::spawn(server);
            format!("http://{address}")
        }

        fn spans(&self) -> Vec<Received> {
            let received = self.0.lock().unwrap();
            let resources = received.iter().flat_map(|request| &request.resource_spans);
            resources
                .flat_map(|resource| &resource.scope_spans)
                .flat_map(|scope| scope.spans.clone())
                .collect()
        }
    }

    async fn tell(endpoint: &str, metadata: &MetadataMap, error: Option<&'static str>) {
        let timings = Timings::begin();
        timings.note(
            "network",
            Duration::from_millis(1),
            Duration::from_millis(20),
        );
        timings.note(
            "boot guest",
            Duration::from_millis(21),
            Duration::from_millis(300),
        );
        let telemetry = Telemetry::new(endpoint).unwrap();
        telemetry.pod_started(
            &Caller::of(metadata),
            &sandbox("abc", "pod"),
            &timings,
            error,
        );
        tokio::task::spawn_blocking(move || telemetry.shut_down())
            .await
            .unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_gets_the_steps_of_a_start() {
        let collector = Collector::default();
        tell(&collector.serve().await, &MetadataMap::new(), None).await;
        let spans = collector.spans();
        let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
        let (root, network, boot) = (
            named("RunPodSandbox"),
            named("network"),
            named("boot guest"),
        );
        assert!(root.parent_span_id.is_empty());
        for step in [network, boot] {
            assert_eq!(step.parent_span_id, root.span_id);
            assert_eq!(step.trace_id, root.trace_id);
        }
        let after = |span: &Received| span.start_time_unix_nano - root.start_time_unix_nano;
        let length = |span: &Received| span.end_time_unix_nano - span.start_time_unix_nano;
        assert_eq!((after(network), length(network)), (1_000_000, 20_000_000));
        assert_eq!((after(boot), length(boot)), (21_000_000, 300_000_000));
        let keys: Vec<_> = root
            .attributes
            .iter()
            .map(|pair| pair.key.as_str())
            .collect();
        assert!(keys.contains(&"k8s.pod.name"), "{keys:?}");
        assert!(keys.contains(&"caisson.pod.id"), "{keys:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_start_is_a_part_of_its_callers_trace_and_tells_its_error() {
        let collector = Collector::default();
        let mut metadata = MetadataMap::new();
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        metadata.insert("traceparent", parent.parse().unwrap());
        tell(&collector.serve().await, &metadata, Some("no tap")).await;
        let spans = collector.spans();
        let root = spans
            .iter()
            .find(|span| span.name == "RunPodSandbox")
            .unwrap();
        assert_eq!(root.trace_id[..2], [0x0a, 0xf7]);
        assert_eq!(root.parent_span_id[..2], [0xb7, 0xad]);
        assert_eq!(root.status.as_ref().unwrap().message, "no tap");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_that_is_not_there_costs_the_spans_alone() {
        tell("http://127.0.0.1:1", &MetadataMap::new(), None).await;
        assert!(Telemetry::new("no address").is_err());
    }

    #[test]
    fn what_is_no_trace_is_none() {
        for header in [
            "",
            "00-zz",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            let mut metadata = MetadataMap::new();
            metadata.insert("traceparent", header.parse().unwrap());
            let caller = Caller::of(&metadata);
            assert!(!caller.0.span().span_context().is_valid(), "{header}");
        }
    }
}
