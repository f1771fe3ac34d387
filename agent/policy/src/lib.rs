//! Kubernetes network policies for the pods of a node: API types, compiler and oracle.
//!
//! The crate is pure: it opens no sockets, starts no programs and reads no clock. It links neither
//! kube nor k8s-openapi.

#![forbid(unsafe_code)]

pub mod api;
