//! `cargo e2e cluster`: a real Kubernetes for experiments and tests, and its programs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

use crate::suite;
use skein_cluster::scale::{self, Scale};
use skein_cluster::{Kube, Options, programs};
use skein_lab::console::Console;
use skein_lab::registry;

/// Commands of `cargo e2e cluster`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fill the cache: build Kubernetes, fetch helm
    Build,
    /// Start a cluster that runs until Ctrl-C
    Up(Up),
    /// Measure the cost of thousands of SkeinNodes for one agent
    Scale(Scale),
    /// Run the tests that need a cluster
    Test(suite::Options),
}

/// Options of `cargo e2e cluster up`.
#[derive(Debug, Args)]
pub struct Up {
    /// Number of nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=100))]
    nodes: u8,
    /// Addresses of both families for pods and Services
    #[arg(long)]
    dual_stack: bool,
    /// MTU of the underlay in bytes
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    mtu: u32,
}

/// Runs a command of `cargo e2e cluster`.
///
/// # Errors
/// If the programs cannot be built, if the cluster does not start, or if the command fails.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Build => {
            let programs = programs::build(&Console::new())?;
            println!("The programs are in {}", programs.kubernetes.display());
            Ok(())
        }
        Command::Up(options) => up(options),
        Command::Scale(options) => scale::run(options),
        Command::Test(options) => suite::run_cluster(options),
    }
}

fn up(options: &Up) -> Result<()> {
    let console = Console::new();
    programs::build(&console)?;
    registry::prepare();
    console.step("starting the machines");
    let Up { nodes, dual_stack, mtu } = *options;
    let kube = Kube::up(&Options { nodes, dual_stack, mtu })?;
    let bin = kube.directory().join("bin");
    write_commands(&kube, &bin)?;
    let bin = bin.display();
    console.print(&format!(
        "{}\n\
         The nodes have no network plugin, so they are NotReady. Images: {} and {}.\n\n  \
         {bin}/kubectl get nodes\n  \
         {bin}/helm install …\n  \
         {bin}/node1 sh\n\n\
         KUBECONFIG={}. Commands in `ip netns exec {}` reach the API server.\n\
         Ctrl-C removes everything.",
        kube.kubectl(&["get", "nodes", "--output=wide"])?,
        programs::BUSYBOX,
        programs::TOOLS,
        kube.kubeconfig().display(),
        kube.switch().name(),
    ));
    drop(console);
    loop {
        // A signal ends this process after the cleanup.
        thread::park();
    }
}

/// Writes scripts to `bin`: `kubectl` and `helm` for the cluster, and one with the name of each
/// machine, which runs a command there.
fn write_commands(kube: &Kube, bin: &Path) -> Result<()> {
    fs::create_dir_all(bin)?;
    let write = |name: &str, line: &str| -> Result<()> {
        let path: PathBuf = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\nexec {line} \"$@\"\n"))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("writing {}", path.display()))
    };
    for program in ["kubectl", "helm"] {
        let command = kube.command(kube.program(program));
        let (home, config) = (kube.directory().display(), kube.kubeconfig().display());
        let line = skein_lab::process::describe(&command);
        write(program, &format!("env HOME={home} KUBECONFIG={config} {line}"))?;
    }
    for machine in kube.nodes.iter().map(|node| &**node).chain([&kube.control]) {
        write(machine.name(), &machine.entrance()?)?;
    }
    Ok(())
}
