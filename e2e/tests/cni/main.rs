//! Pods attached by the CNI plugin, and container runtimes that call the plugin.

mod conflist;
mod faults;
mod newer_runtime;
mod pods;
mod runtime;
