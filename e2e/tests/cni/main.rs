//! Pods attached by the CNI plugin, and container runtimes that call the plugin.

mod addresses;
mod attachments;
mod conflist;
mod cri;
mod faults;
mod forward_chains;
mod installation;
mod isolation;
mod newer_runtime;
mod restarts;
mod runtime;
mod support;
