//! The command line.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use zeroize::Zeroizing;

use crate::config::{Config, DEFAULT_PATH, Log, LogFormat, Mode};
use crate::control::kubernetes::{resource, uninstall};
use crate::control::{self, Ended, cleanup, identity, server};
use crate::failure::Failure;
use crate::keys::PrivateKey;
use crate::lifecycle::Signals;
use crate::status::{self, Align, table};
use crate::sys::probe::{Probe, probe_all};
use crate::{dataplane, lifecycle, logging};

#[derive(Parser)]
#[command(name = "skein-agent", version, about = "The Skein node agent", long_about = None)]
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
        /// Take the place of the agent that runs, if one does
        #[arg(long)]
        take_over: bool,
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
        /// For the keeper, which starts the data process: the descriptor of its channel
        #[arg(long, hide = true)]
        worker: Option<i32>,
    },
    /// Show the state of the running agent
    Status {
        #[command(flatten)]
        config: ConfigArgs,
        /// The agent's socket (overrides control.socket)
        #[arg(long)]
        socket: Option<PathBuf>,
        /// Form of the output
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
        /// Seconds between the two looks that rates are computed from; 0: one look, no rates
        #[arg(long, default_value_t = 1.0)]
        interval: f64,
    },
    /// Show what this kernel and machine support, before anything is started
    Check {
        /// Form of the output
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Remove the interface, the sockets and a data process that was left running
    Cleanup {
        #[command(flatten)]
        config: ConfigArgs,
        /// Also remove the state: the node's key and the last good node records
        #[arg(long)]
        state: bool,
    },
    /// Do nothing until ended: for a DaemonSet whose pods have done their work
    #[command(hide = true)]
    Hold,
    /// Print the definition of the SkeinNode resource (kubectl apply -f -)
    Crd,
    /// Take Skein from every node of a Kubernetes cluster (what the chart does before it goes)
    Uninstall(UninstallArgs),
    /// Make a private key
    Keygen {
        /// Write it to this file (mode 0600), and the public key to standard output
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Change the key of the running agent's node, without a lost packet
    RotateKey {
        #[command(flatten)]
        config: ConfigArgs,
        /// The agent's socket (overrides control.socket)
        #[arg(long)]
        socket: Option<PathBuf>,
        /// The old key is known to others: give it up at once, at the cost of packets
        #[arg(long)]
        at_once: bool,
        /// Form of the output
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Set what the running agent and its data process log, until they start anew
    LogLevel {
        #[command(flatten)]
        config: ConfigArgs,
        /// The agent's socket (overrides control.socket)
        #[arg(long)]
        socket: Option<PathBuf>,
        /// error, warn, info, debug, trace, or a filter of these; without it as configured
        level: Option<String>,
    },
    /// Compute the public key of a private key
    Pubkey {
        /// The private key's file; without it or --config, standard input
        file: Option<PathBuf>,
        /// Use the key of the agent with this configuration
        #[arg(long, conflicts_with = "file")]
        config: Option<PathBuf>,
    },
}

#[derive(Args)]
struct ConfigArgs {
    /// The agent's configuration
    #[arg(long, default_value = DEFAULT_PATH, env = "SKEIN_CONFIG")]
    config: PathBuf,
    /// Name of this node (overrides name)
    #[arg(long, env = "SKEIN_NODE_NAME")]
    name: Option<String>,
}

impl ConfigArgs {
    fn load(&self) -> Result<Config, Failure> {
        Config::load(&self.config, self.name.as_deref())
    }
}

#[derive(Args)]
struct UninstallArgs {
    /// Namespace of the agents
    #[arg(long)]
    namespace: String,
    /// The agents' DaemonSet
    #[arg(long)]
    daemonset: String,
    /// Labels of its pods, as key=value,key=value
    #[arg(long)]
    selector: String,
    /// File with the manifest of a DaemonSet that cleans up a node
    #[arg(long)]
    cleanup: PathBuf,
    /// Seconds that it all may take
    #[arg(long, default_value_t = 240.0)]
    timeout: f64,
    /// Which cluster; without it that of this pod
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Runs the command that the command line asks for.
pub fn main() -> Result<(), Failure> {
    match Cli::parse().command {
        Command::Run { config, dataplane, take_over } => run(&config, dataplane, take_over),
        Command::Dataplane { socket, probe: true, .. } => Ok(dataplane::probe(&socket)?),
        Command::Dataplane { socket, log_level, log_format, take_over, worker, .. } => {
            let log = Log { level: log_level, format: log_format };
            logging::start(&log);
            match worker {
                Some(channel) => Ok(dataplane::work(channel)?),
                None => Ok(dataplane::run(&dataplane::Options { socket, take_over, log })?),
            }
        }
        Command::Status { config, socket, output, interval } => {
            show_status(&config, socket, output, interval)
        }
        Command::Check { output } => check(output),
        Command::Cleanup { config, state } => clean(&config, state),
        Command::Hold => hold(),
        Command::Crd => print(&resource::definition()?),
        Command::Uninstall(options) => uninstall(&options),
        Command::Keygen { out } => keygen(out.as_deref()),
        Command::RotateKey { config, socket, at_once, output } => {
            rotate_key(&config, socket, at_once, output)
        }
        Command::LogLevel { config, socket, level } => log_level(&config, socket, level.as_deref()),
        Command::Pubkey { file, config } => pubkey(file, config),
    }
}

fn run(config: &ConfigArgs, mode: Option<Mode>, take_over: bool) -> Result<(), Failure> {
    let mut config = config.load()?;
    if let Some(mode) = mode {
        config.dataplane.mode = mode;
    }
    logging::start(&config.log);
    let shown = serde_json::to_string(&config).context("cannot print the configuration")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %shown, "starting");
    // One thread is enough for what is done here, and keeps the process small.
    match runtime()?.block_on(control::run(config, take_over))? {
        Ended::Asked => Ok(()),
        // The kernel closes all that this process has, and whoever started it sees no end of it.
        Ended::GaveWay if take_over => Err(Failure::Runtime(lifecycle::retire().into())),
        Ended::GaveWay => Ok(()),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("cannot start the runtime")?)
}

fn show_status(
    config: &ConfigArgs,
    socket: Option<PathBuf>,
    output: Output,
    interval: f64,
) -> Result<(), Failure> {
    let socket = control_socket(config, socket)?;
    let fetch =
        || async { server::fetch(&socket).await.map_err(|error| no_answer(&socket, &error)) };
    let interval = Duration::try_from_secs_f64(interval)
        .map_err(|_| Failure::Usage("--interval: use a number of seconds, 0 or more".to_owned()))?;
    let text = runtime()?.block_on(async {
        let first = fetch().await?;
        match output {
            Output::Json => json(&first),
            Output::Table if interval.is_zero() || first.report.is_none() => {
                Ok(status::render(&first, None))
            }
            Output::Table => {
                let started = std::time::Instant::now();
                tokio::time::sleep(interval).await;
                let second = fetch().await?;
                Ok(status::render(&second, Some((&first, started.elapsed()))))
            }
        }
    })?;
    print(&text)
}

fn control_socket(config: &ConfigArgs, socket: Option<PathBuf>) -> Result<PathBuf, Failure> {
    match socket {
        Some(socket) => Ok(socket),
        None => Ok(config.load()?.control.socket),
    }
}

fn no_answer(socket: &Path, error: &std::io::Error) -> Failure {
    let shown = socket.display();
    if error.kind() == std::io::ErrorKind::PermissionDenied {
        return Failure::Privilege(format!(
            "{shown} is for root and the agent's own user: {error}: run as root"
        ));
    }
    Failure::Runtime(anyhow::anyhow!(
        "no agent answers on {shown}: {error}: is it running, and is this its socket (--config, \
         --socket)?"
    ))
}

fn rotate_key(
    config: &ConfigArgs,
    socket: Option<PathBuf>,
    at_once: bool,
    output: Output,
) -> Result<(), Failure> {
    let socket = control_socket(config, socket)?;
    let answer = runtime()?.block_on(server::ask_to_rotate(&socket, at_once));
    let answer = answer.map_err(|error| no_answer(&socket, &error))?;
    let status = answer.map_err(|error| Failure::Runtime(anyhow::anyhow!(error)))?;
    print(&match (output, status.keys.second, &status.waits_for) {
        (Output::Json, ..) => json(&status)?,
        (Output::Table, Some(next), Some(waits_for)) => {
            format!("next public key: {next}\nwaits for {waits_for}\n")
        }
        (Output::Table, ..) => format!("public key: {}\n", status.keys.first),
    })
}

fn log_level(
    config: &ConfigArgs,
    socket: Option<PathBuf>,
    level: Option<&str>,
) -> Result<(), Failure> {
    if let Some(level) = level {
        logging::parse(level).map_err(Failure::Usage)?;
    }
    let socket = control_socket(config, socket)?;
    let answer = runtime()?.block_on(server::ask_for_level(&socket, level));
    let answer = answer.map_err(|error| no_answer(&socket, &error))?;
    answer.map_err(|error| Failure::Runtime(anyhow::anyhow!(error)))
}

fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    Ok(serde_json::to_string_pretty(value).context("cannot print the answer")? + "\n")
}

/// Prints; a reader that has enough (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::io("cannot print the answer", error))
        }
        _ => Ok(()),
    }
}

fn check(output: Output) -> Result<(), Failure> {
    let probes = probe_all();
    print(&match output {
        Output::Json => {
            let entry = |probe: &Probe| {
                serde_json::json!({
                    "name": probe.name,
                    "ok": probe.ok,
                    "required": probe.required,
                    "detail": probe.detail,
                })
            };
            json(&probes.iter().map(entry).collect::<Vec<_>>())?
        }
        Output::Table => {
            let row = |probe: &Probe| {
                let state = match (probe.ok, probe.required) {
                    (true, _) => "ok",
                    (false, true) => "MISSING",
                    (false, false) => "absent",
                };
                vec![probe.name.to_owned(), state.to_owned(), probe.detail.clone()]
            };
            let columns = [("WHAT", Align::Left), ("STATE", Align::Left), ("DETAIL", Align::Left)];
            table(&columns, probes.iter().map(row)) + "\n"
        }
    })?;
    let missing = || probes.iter().filter(|probe| probe.required && !probe.ok);
    let list = |probes: Vec<&Probe>| {
        let names: Vec<_> = probes.iter().map(|p| format!("{}: {}", p.name, p.detail)).collect();
        format!("missing: {}", names.join("; "))
    };
    let privileges: Vec<_> = missing().filter(|p| p.name.starts_with("cap_")).collect();
    if !privileges.is_empty() {
        return Err(Failure::Privilege(list(privileges)));
    }
    match missing().collect::<Vec<_>>() {
        none if none.is_empty() => Ok(()),
        some => Err(Failure::Missing(list(some))),
    }
}

fn clean(config: &ConfigArgs, state: bool) -> Result<(), Failure> {
    let config = config.load()?;
    logging::start(&config.log);
    let cleaned = runtime()?.block_on(cleanup::cleanup(&config, state))?;
    let mut text: String = cleaned.removed.iter().map(|what| format!("removed {what}\n")).collect();
    if cleaned.removed.is_empty() && cleaned.errors.is_empty() {
        text.push_str("nothing to remove\n");
    }
    print(&text)?;
    if !cleaned.errors.is_empty() {
        return Err(Failure::Runtime(anyhow::anyhow!(
            "not everything could be removed:\n{}",
            cleaned.errors.join("\n")
        )));
    }
    Ok(())
}

fn hold() -> Result<(), Failure> {
    runtime()?.block_on(async {
        Signals::take().context("cannot take signals")?.end().await;
        Ok(())
    })
}

fn uninstall(options: &UninstallArgs) -> Result<(), Failure> {
    let timeout = Duration::try_from_secs_f64(options.timeout)
        .map_err(|_| Failure::Usage("--timeout: use a number of seconds".to_owned()))?;
    let options = uninstall::Options {
        namespace: &options.namespace,
        daemonset: &options.daemonset,
        selector: &options.selector,
        cleanup: &options.cleanup,
        timeout,
        kubeconfig: options.kubeconfig.as_deref(),
    };
    let say = |text: &str| print(&format!("{text}\n")).unwrap_or_default();
    Ok(runtime()?.block_on(uninstall::uninstall(&options, say))?)
}

fn keygen(out: Option<&Path>) -> Result<(), Failure> {
    let key = PrivateKey::generate().context("cannot make a private key")?;
    match out {
        Some(path) => {
            identity::store(path, &key)?;
            print(&format!("{}\n", key.public().context("cannot compute the public key")?))
        }
        None => {
            let mut text = key.to_base64();
            text.push('\n');
            print(&text)
        }
    }
}

fn pubkey(file: Option<PathBuf>, config: Option<PathBuf>) -> Result<(), Failure> {
    let path = match (file, config) {
        (None, Some(config)) => Some(Config::load(&config, None)?.key_path()),
        (file, _) => file,
    };
    let key = match path {
        Some(path) => identity::load(&path)?.ok_or_else(|| {
            let shown = path.display();
            Failure::Usage(format!(
                "there is no private key {shown}: make it with skein-agent keygen --out {shown}"
            ))
        })?,
        None => {
            let mut text = Zeroizing::new(String::with_capacity(1024));
            std::io::stdin()
                .take(1024)
                .read_to_string(&mut text)
                .context("cannot read the private key from standard input")?;
            text.parse::<PrivateKey>().map_err(|error| {
                Failure::Usage(format!("standard input holds no private key: it is {error}"))
            })?
        }
    };
    print(&format!("{}\n", key.public().context("cannot compute the public key")?))
}
