//! `skein-cni`, the CNI plugin that the container runtime starts for each operation on a pod's
//! network.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    skein_cni::plugin::main()
}
