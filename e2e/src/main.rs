//! `cargo e2e`: Skein's demonstration, tests and benchmark on this host.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use skein_bench as bench;
use skein_e2e::{cluster, demo, soak, suite, versions};
use skein_lab::registry;

/// Demonstrate, test and measure Skein on this host, with network namespaces as machines and pods
#[derive(Debug, Parser)]
#[command(name = "cargo e2e", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the encrypted overlay between two nodes with one pod each
    Demo(demo::Options),
    /// Run all unit, property and namespace tests
    Test(suite::Options),
    /// Compare the performance of Skein with other overlays
    Bench(bench::Options),
    /// Compare ADD and DEL of pods with the reference CNI plugins
    BenchPods(bench::pods::Options),
    /// Measure the cost of thousands of node records
    Scale(bench::scale::Options),
    /// Run mixed traffic under injected faults and check its content and the agents' resources
    Soak(soak::Options),
    /// Test take-overs between agents of an earlier commit and of this tree, under traffic
    Versions(versions::Options),
    /// Start a Kubernetes cluster, or run tests on one
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Run each fuzz target for a limited time
    Fuzz(suite::fuzz::Options),
    /// Remove namespaces, files and settings that an interrupted run left on this host
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
            println!("Leftovers removed: {}", removed.len());
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
