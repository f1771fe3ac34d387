//! Definition of the command line. The module [`crate::commands`] contains the commands.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use skein_dataplane as dataplane;
use skein_dataplane::ConfinementOptions;
use skein_ipc::instance::Instance;

use crate::commands::{
    ConfigArgs, SampleArgs, bench, capture, check, connectivity, generate, hold, key, peers,
    policy, service, status, sysdump, top, trace,
};
#[cfg(feature = "kubernetes")]
use crate::commands::{print, uninstall};
use crate::config::Mode;
#[cfg(feature = "kubernetes")]
use crate::control::kubernetes::resource;
use crate::failure::Failure;
use crate::logging;
use crate::logging::{Log, LogFormat};

/// Exit codes, as `--help` and the manual page list them. docs/operations.md explains them.
const EXIT_CODES: &str = "\
Exit codes:
  0  success; what the command examines is healthy
  1  failure at run time, or what the command examines is not healthy
  2  error in the command line, the configuration or the node records
  3  a privilege is missing
  4  a kernel feature or device is missing
  5  a resource is in use: port, interface of another program, state directory";

#[derive(Parser)]
#[command(
    name = "skein-agent",
    version,
    about = "The Skein node agent",
    long_about = None,
    after_help = EXIT_CODES
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent, which manages the interface, routes, metrics and the data process
    Run {
        #[command(flatten)]
        config: ConfigArgs,
        /// Start mode of the data process (overrides dataplane.mode)
        #[arg(long)]
        dataplane: Option<Mode>,
        #[command(flatten)]
        start: service::StartArgs,
    },
    /// Run the data process alone; an agent configures it over its socket
    Dataplane {
        /// Path of the unix socket to listen on
        #[arg(long, default_value = "/run/skein/dataplane.sock")]
        socket: PathBuf,
        /// Log filter: error, warn, info, debug, trace, or directives for single modules
        #[arg(long, default_value = "info")]
        log_level: String,
        /// Log format
        #[arg(long, value_enum, default_value = "text")]
        log_format: LogFormat,
        /// Take over descriptors and sessions from a data process that listens on the socket
        #[arg(long)]
        take_over: bool,
        /// Check that the data process on the socket answers, then exit
        #[arg(long, conflicts_with = "take_over")]
        probe: bool,
        /// Directory of the sockets of this pod. With this option, the command acquires the data
        /// plane of the node when the agent of this pod requests it, not at once
        #[arg(long)]
        instance: Option<PathBuf>,
        /// Confine the data process neither with seccomp nor with Landlock (dataplane.seccomp =
        /// false)
        #[arg(long)]
        no_seccomp: bool,
        /// Exit if seccomp or Landlock cannot confine the data process
        /// (dataplane.require_confinement = true)
        #[arg(long, conflicts_with = "no_seccomp")]
        require_confinement: bool,
        /// Descriptor of the channel to the keeper, which starts the data process
        #[arg(long, hide = true)]
        worker: Option<i32>,
    },
    /// Show the state of the running agent
    Status(SampleArgs),
    /// List peers and their connection state; exit with code 1 if a peer is unreachable
    Peers(peers::PeersArgs),
    /// Check which features this kernel and machine support; works without a running agent
    Check(check::CheckArgs),
    /// Show current rates, batch sizes, drops and peers, refreshed until q is pressed
    Top(top::TopArgs),
    /// Trace the route of a packet step by step, or show dropped packets
    Trace(trace::TraceArgs),
    /// Write inner packets of a peer or pod to a pcap file
    Capture(capture::CaptureArgs),
    /// Measure TCP throughput, round-trip time and UDP packet rate to a peer, over the overlay and
    /// over the underlay
    Bench(bench::BenchArgs),
    /// Test connectivity between all nodes and pods of a cluster, or from this node to its peers
    ConnectivityTest(connectivity::ConnectivityArgs),
    /// Probe targets, or answer probes, in a pod of connectivity-test
    #[cfg(feature = "kubernetes")]
    #[command(hide = true)]
    Probe(connectivity::ProbeArgs),
    /// List network policies, show those of a pod, or check files with policies
    Policy(policy::PolicyArgs),
    /// Collect state, logs and network configuration in one archive for support, without secrets
    Sysdump(sysdump::SysdumpArgs),
    /// Remove the interface, the sockets, and a data process that still runs
    Cleanup {
        #[command(flatten)]
        config: ConfigArgs,
        /// Also remove the state: the node's private key and the last valid node records
        #[arg(long)]
        state: bool,
    },
    /// Check that the agent of this pod is alive (for probes of kubelet)
    #[command(hide = true)]
    Health(service::HealthArgs),
    /// Wait for a signal; with --lock, wait until no agent holds the lock, then run the agent again
    #[command(hide = true)]
    Hold(hold::HoldArgs),
    /// Print the CustomResourceDefinition of SkeinNode (for kubectl apply -f -)
    #[cfg(feature = "kubernetes")]
    Crd,
    /// Remove Skein from every node of a Kubernetes cluster (the chart's pre-delete hook)
    #[cfg(feature = "kubernetes")]
    Uninstall(uninstall::UninstallArgs),
    /// Generate a private key
    Keygen {
        /// File for the private key (mode 0600); the public key is then printed to standard output
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Rotate the key of the running agent's node without packet loss
    RotateKey(key::RotateArgs),
    /// Set the log level of the running agent and its data process until they restart
    LogLevel(service::LogLevelArgs),
    /// Print the public key of a private key
    Pubkey {
        /// File with the private key [default: standard input, unless --config is given]
        file: Option<PathBuf>,
        /// Configuration file of the agent whose key is used
        #[arg(long, conflicts_with = "file")]
        config: Option<PathBuf>,
    },
    /// Print a shell completion script
    Completions {
        /// Shell that the script is for
        shell: Shell,
    },
    /// Print the manual page, or write the manual pages of all commands to a directory
    Man {
        /// Directory for the pages, created if it is missing
        directory: Option<PathBuf>,
    },
}

/// Parses the command line and runs the command.
///
/// # Errors
/// The failure of the command, by the kind that determines the exit code ([`Failure`]). Errors of
/// the command line itself end the process in `clap`.
pub fn main() -> Result<(), Failure> {
    match Cli::parse().command {
        Command::Run { config, dataplane, start } => service::run(&config, dataplane, start),
        Command::Dataplane { socket, probe: true, instance, .. } => {
            Ok(dataplane::probe(&socket, instance.map(Instance::new).as_ref())?)
        }
        Command::Dataplane {
            socket,
            log_level,
            log_format,
            take_over,
            no_seccomp,
            require_confinement: required,
            worker,
            instance,
            ..
        } => {
            let instance = instance.map(Instance::new);
            let log = Log { level: log_level, format: log_format };
            let confinement = ConfinementOptions { enabled: !no_seccomp, required };
            // Call this before a second thread starts, because the kernel stores capabilities per
            // thread.
            let confined = dataplane::confine(worker.is_some(), confinement)?;
            logging::start(&log);
            confined.log();
            match worker {
                Some(channel) => {
                    Ok(dataplane::work(channel, confined, |level| Ok(logging::set_level(level)?))?)
                }
                None => {
                    let arguments = worker_arguments(&socket, &log, confinement);
                    let options = dataplane::Options { socket, take_over, instance };
                    Ok(dataplane::run(&options, &arguments)?)
                }
            }
        }
        Command::Status(arguments) => status::status(&arguments),
        Command::Peers(arguments) => peers::peers(&arguments),
        Command::Check(arguments) => check::check(&arguments),
        Command::Top(arguments) => top::top(&arguments),
        Command::Trace(arguments) => trace::trace(&arguments),
        Command::Capture(arguments) => capture::capture(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::ConnectivityTest(arguments) => connectivity::connectivity(&arguments),
        #[cfg(feature = "kubernetes")]
        Command::Probe(arguments) => connectivity::probe(&arguments),
        Command::Policy(arguments) => policy::policy(&arguments),
        Command::Sysdump(arguments) => sysdump::sysdump(&arguments),
        Command::Cleanup { config, state } => service::clean(&config, state),
        Command::Health(arguments) => service::health(&arguments),
        Command::Hold(arguments) => hold::hold(&arguments),
        #[cfg(feature = "kubernetes")]
        Command::Crd => print(&resource::definition()?),
        #[cfg(feature = "kubernetes")]
        Command::Uninstall(options) => uninstall::uninstall(&options),
        Command::Keygen { out } => key::keygen(out.as_deref()),
        Command::RotateKey(arguments) => key::rotate(&arguments),
        Command::LogLevel(arguments) => service::log_level(&arguments),
        Command::Pubkey { file, config } => key::pubkey(file, config),
        Command::Completions { shell } => generate::completions(Cli::command(), shell),
        Command::Man { directory } => generate::man(Cli::command(), directory.as_deref()),
    }
}

/// Returns the arguments that start this program as a data process. The caller appends the number
/// of the channel's descriptor.
fn worker_arguments(socket: &Path, log: &Log, confinement: ConfinementOptions) -> Vec<OsString> {
    let log = ["--log-level", &log.level, "--log-format", log.format.name()];
    // The data process inherits the socket. The path only identifies the process for users.
    let socket = [OsStr::new("--socket"), socket.as_os_str()];
    let mut arguments: Vec<OsString> = vec!["dataplane".into()];
    arguments.extend(log.map(Into::into));
    arguments.extend(socket.map(Into::into));
    let ConfinementOptions { enabled, required } = confinement;
    arguments.extend((!enabled).then(|| "--no-seccomp".into()));
    arguments.extend(required.then(|| "--require-confinement".into()));
    arguments.push("--worker".into());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }
}
