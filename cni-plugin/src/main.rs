//! `skein-cni`: what kubelet's container runtime starts for every pod that comes and goes.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    skein_cni::plugin::main()
}
