//! The Kubernetes Container Runtime Interface.
