//! CRI `runtime.v1alpha2`, generated: what a kubelet of before Kubernetes 1.26 speaks.
#![allow(missing_docs, clippy::all)]

tonic::include_proto!("runtime.v1alpha2");
