//! The command line: what can be asked for. The commands themselves are in [`crate::commands`].

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use skein_dataplane as dataplane;
use skein_dataplane::ConfinementOptions;
use skein_ipc::instance::Instance;

use crate::commands::{
    ConfigArgs, LookArgs, bench, capture, check, connectivity, generate, hold, key, peers, service,
    status, sysdump, top, trace,
};
#[cfg(feature = "kubernetes")]
use crate::commands::{print, uninstall};
use crate::config::Mode;
#[cfg(feature = "kubernetes")]
use crate::control::kubernetes::resource;
use crate::failure::Failure;
use crate::logging;
use crate::logging::{Log, LogFormat};

/// Shown by --help and in the manual page; explained in docs/operations.md.
const EXIT_CODES: &str = "\
Exit codes:
  0  done, and what was asked about is well
  1  failure at run time, or what was asked about is not well
  2  usage, configuration or node records
  3  a privilege is missing
  4  a kernel feature or device is missing
  5  a resource is taken: port, interface of another program, state directory";

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
    /// Run the agent: interface, routes, metrics, and the data process
    Run {
        #[command(flatten)]
        config: ConfigArgs,
        /// Who starts the data process (overrides dataplane.mode)
        #[arg(long)]
        dataplane: Option<Mode>,
        #[command(flatten)]
        start: service::StartArgs,
    },
    /// Run the data process alone, to be fed over its socket
    Dataplane {
        /// The unix socket to listen on
        #[arg(long, default_value = "/run/skein/dataplane.sock")]
        socket: PathBuf,
        /// Filter of the log
        #[arg(long, default_value = "info")]
        log_level: String,
        /// Form of the log
        #[arg(long, value_enum, default_value = "text")]
        log_format: LogFormat,
        /// Take descriptors and sessions over from the one that runs there, if one does
        #[arg(long)]
        take_over: bool,
        /// Ask the one that runs there for an answer within seconds, and end
        #[arg(long, conflicts_with = "take_over")]
        probe: bool,
        /// Directory of this pod's own sockets; the data process takes over when the pod's agent
        /// does
        #[arg(long)]
        instance: Option<PathBuf>,
        /// Let the data process make any system call and open any file (dataplane.seccomp = false)
        #[arg(long)]
        no_seccomp: bool,
        /// End if seccomp or Landlock cannot confine the data process
        /// (dataplane.require_confinement = true)
        #[arg(long, conflicts_with = "no_seccomp")]
        require_confinement: bool,
        /// For the keeper, which starts the data process: the descriptor of its channel
        #[arg(long, hide = true)]
        worker: Option<i32>,
    },
    /// Show the state of the running agent
    Status(LookArgs),
    /// Show the other nodes and how they are; exit code 1 where one is unreachable
    Peers(peers::PeersArgs),
    /// Show what this kernel and machine support, before anything is started
    Check(check::CheckArgs),
    /// Show what passes now, refreshed until q
    Top(top::TopArgs),
    /// Say why a packet goes where it goes, or which are dropped
    Trace(trace::TraceArgs),
    /// Write inner packets of a peer or pod to a pcap file
    Capture(capture::CaptureArgs),
    /// Measure what this node and a peer can do, over the overlay and beside it
    Bench(bench::BenchArgs),
    /// Test who reaches whom: all nodes and pods of a cluster, or this node's peers
    ConnectivityTest(connectivity::ConnectivityArgs),
    /// Probe, or answer probes: what the pods of connectivity-test run
    #[cfg(feature = "kubernetes")]
    #[command(hide = true)]
    Probe(connectivity::ProbeArgs),
    /// Collect what somebody who helps will ask for into one archive, without secrets
    Sysdump(sysdump::SysdumpArgs),
    /// Remove the interface, the sockets and a data process that was left running
    Cleanup {
        #[command(flatten)]
        config: ConfigArgs,
        /// Also remove the state: the node's key and the last good node records
        #[arg(long)]
        state: bool,
    },
    /// Check that the agent of this pod is alive; for a kubelet probe
    #[command(hide = true)]
    Health(service::HealthArgs),
    /// Wait for a signal; with --lock, wait until the agent's role is free, then run the command
    #[command(hide = true)]
    Hold(hold::HoldArgs),
    /// Print the definition of the SkeinNode resource (kubectl apply -f -)
    #[cfg(feature = "kubernetes")]
    Crd,
    /// Take Skein from every node of a Kubernetes cluster (what the chart does before it goes)
    #[cfg(feature = "kubernetes")]
    Uninstall(uninstall::UninstallArgs),
    /// Make a private key
    Keygen {
        /// Write it to this file (mode 0600), and the public key to standard output
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Change the key of the running agent's node, without a lost packet
    RotateKey(key::RotateArgs),
    /// Set what the running agent and its data process log, until they start anew
    LogLevel(service::LogLevelArgs),
    /// Compute the public key of a private key
    Pubkey {
        /// The private key's file; without it or --config, standard input
        file: Option<PathBuf>,
        /// Use the key of the agent with this configuration
        #[arg(long, conflicts_with = "file")]
        config: Option<PathBuf>,
    },
    /// Print what completes this program's commands in a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write that of every command into a directory
    Man {
        /// The directory; made where it is missing
        directory: Option<PathBuf>,
    },
}

/// Runs the command that the command line asks for.
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
            // Before there is a second thread: the kernel keeps rights for each.
            let confined = dataplane::confine(worker.is_some(), confinement)?;
            logging::start(&log);
            confined.log();
            match worker {
                Some(channel) => Ok(dataplane::work(channel, confined, logging::set_level)?),
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

/// Returns the arguments of this program that start a data process. The number of the descriptor of
/// its channel follows them.
fn worker_arguments(socket: &Path, log: &Log, confinement: ConfinementOptions) -> Vec<OsString> {
    let log = ["--log-level", &log.level, "--log-format", log.format.name()];
    // The data process inherits the socket; its name shows users whose data process this is.
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
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
