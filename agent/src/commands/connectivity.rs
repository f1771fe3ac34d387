//! `skein-agent connectivity-test`: matrix of the connectivity between nodes and pods.

#[cfg(feature = "kubernetes")]
mod kubernetes;
mod matrix;
#[cfg(feature = "kubernetes")]
mod pods;
// Only pods of the test in a cluster answer probes.
#[cfg_attr(not(feature = "kubernetes"), allow(dead_code))]
mod probe;

use std::collections::BTreeMap;
use std::io::{BufWriter, ErrorKind, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Args;

use self::matrix::{Matrix, Target};
use super::{AgentArgs, Output, OutputArgs, print, report, runtime, seconds};
use crate::control::records::first_host;
use crate::failure::Failure;
use crate::status::Document;

#[derive(Args)]
pub(crate) struct ConnectivityArgs {
    /// Kubeconfig file of the cluster whose nodes and pods are tested. Without this option, the
    /// command uses the file of kubectl if the agent's records come from Kubernetes, and otherwise
    /// tests the connections from this node to its peers
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Kubernetes: test the cluster of this pod's service account or of kubectl, regardless of the
    /// agent's configuration
    #[arg(long)]
    kubernetes: bool,
    /// Kubernetes: namespace of the test's pods, which are removed at the end
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Kubernetes: namespace of the agents
    #[arg(long, default_value = "kube-system")]
    agents_namespace: String,
    /// Kubernetes: DaemonSet of the agents, whose image the test uses
    #[arg(long, default_value = "skein")]
    daemonset: String,
    /// Timeout of the whole test in seconds
    #[arg(long, default_value_t = 180.0)]
    timeout: f64,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Options of `probe`, which the test's own pods run.
#[cfg(feature = "kubernetes")]
#[derive(Args)]
pub(crate) struct ProbeArgs {
    /// TCP and UDP port on which probes are answered
    #[arg(long)]
    answer: Option<u16>,
    /// File that lists the targets to probe
    #[arg(long)]
    targets: Option<PathBuf>,
    /// Timeout of all probes in seconds
    #[arg(long, default_value_t = 60.0)]
    timeout: f64,
}

pub(crate) fn connectivity(arguments: &ConnectivityArgs) -> Result<(), Failure> {
    let timeout = seconds("--timeout", arguments.timeout)?;
    let in_cluster = arguments.kubernetes
        || arguments.kubeconfig.is_some()
        || arguments.agent.config.load().is_ok_and(|config| config.kubernetes.enabled);
    let matrix = if in_cluster {
        test_cluster(arguments, timeout)?
    } else {
        let end = Instant::now() + timeout;
        let agent = arguments.agent.agent()?;
        let status = runtime()?.block_on(agent.status())?;
        let targets = targets(&status)?;
        let mut matrix = Matrix::new(&targets, BTreeMap::new());
        matrix.add_row(status.node, Ok(probe::all(&targets, end)?));
        matrix
    };
    match arguments.output.output {
        Output::Json => print_json(&matrix)?,
        Output::Table => print(&matrix.render())?,
    }
    matrix.failure_summary().map_or(Ok(()), |summary| Err(Failure::Runtime(anyhow!(summary))))
}

#[cfg(feature = "kubernetes")]
fn test_cluster(arguments: &ConnectivityArgs, timeout: Duration) -> Result<Matrix, Failure> {
    let options = kubernetes::Options {
        kubeconfig: arguments.kubeconfig.as_deref(),
        namespace: &arguments.namespace,
        agents_namespace: &arguments.agents_namespace,
        daemonset: &arguments.daemonset,
        timeout,
    };
    // Standard output is for the matrix.
    let report = |text: &str| eprintln!("{text}");
    Ok(runtime()?.block_on(kubernetes::test(&options, report))?)
}

#[cfg(not(feature = "kubernetes"))]
fn test_cluster(_: &ConnectivityArgs, _: Duration) -> Result<Matrix, Failure> {
    Err(crate::control::kubernetes::refusal())
}

/// Prints the matrix as a stream, because the text of a large cluster needs much memory.
fn print_json(matrix: &Matrix) -> Result<(), Failure> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let made = serde_json::to_writer_pretty(&mut out, matrix).map_err(std::io::Error::from);
    match made.and_then(|()| writeln!(out)).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

/// Returns the overlay addresses of all peers, one for each pod CIDR.
fn targets(status: &Document) -> Result<Vec<Target>, Failure> {
    let target =
        |name: &str, address: IpAddr| Target { name: name.to_owned(), address, port: None };
    let peers = report(status)?.peers.iter();
    Ok(peers
        .flat_map(|peer| peer.pod_cidrs.iter().map(|cidr| target(&peer.name, first_host(cidr))))
        .collect())
}

#[cfg(feature = "kubernetes")]
pub(crate) fn probe(arguments: &ProbeArgs) -> Result<(), Failure> {
    use anyhow::Context as _;

    let end = Instant::now() + seconds("--timeout", arguments.timeout)?;
    if let Some(port) = arguments.answer {
        return Ok(probe::answer(port)?);
    }
    let file = arguments.targets.as_deref().context("neither --answer nor --targets is given")?;
    let targets = std::fs::File::open(file).and_then(pods::unpack);
    let targets =
        targets.with_context(|| format!("cannot read the targets in {}", file.display()))?;
    let row = probe::all(&targets, end)?;
    let text = serde_json::to_string(&row).context("cannot format the results as JSON")?;
    print(&(text + "\n"))
}

/// Returns a random number, or 0 if the system has no random numbers.
fn rand() -> u32 {
    let mut bytes = [0; 4];
    // The number is not secret. It distinguishes two tests, and probers start with different
    // targets.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u32::from_be_bytes(bytes)
}
