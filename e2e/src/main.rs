//! `cargo e2e`: Skein's demonstration, tests and benchmark on this host.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use skein_bench as bench;
use skein_e2e::{cluster, demo, soak, suite, versions};
use skein_lab::registry;

/// Skein on one host: machines and pods as network namespaces, real agents, real packets.
#[derive(Debug, Parser)]
#[command(name = "cargo e2e", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show two nodes and two pods joined by the encrypted overlay, then remove them.
    Demo(demo::Options),
    /// Run every test: unit, property and namespace tests.
    Test(suite::Options),
    /// Compare Skein with other overlays on this host.
    Bench(bench::Options),
    /// Measure attaching and detaching pods beside the reference plugins.
    BenchPods(bench::pods::Options),
    /// Measure what thousands of node records cost.
    Scale(bench::scale::Options),
    /// Run mixed traffic for an hour while faults befall the nodes: no wrong byte, nothing that
    /// grows.
    Soak(soak::Options),
    /// Take over between an earlier commit and this tree under traffic.
    Versions(versions::Options),
    /// Make a real Kubernetes, or test on one.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Run the fuzz targets for a bounded time each.
    Fuzz(suite::fuzz::Options),
    /// Remove what an interrupted run left behind.
    Cleanup,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => suite::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::BenchPods(options) => bench::pods::run(&options),
        Command::Scale(options) => bench::scale::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Versions(options) => versions::run(&options),
        Command::Cluster(command) => cluster::run(&command),
        Command::Fuzz(options) => suite::fuzz::run(&options),
        Command::Cleanup => {
            let removed = registry::sweep();
            removed.iter().for_each(|name| println!("removed {name}"));
            println!("{} leftovers removed", removed.len());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
