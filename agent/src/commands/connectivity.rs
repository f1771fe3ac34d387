//! `skein-agent connectivity-test`: who reaches whom, as a matrix.

#[cfg(feature = "kubernetes")]
mod kubernetes;
mod matrix;
#[cfg(feature = "kubernetes")]
mod pods;
// Only the pods of a cluster's test answer probes.
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
use crate::control::desired::first_host;
use crate::failure::Failure;
use crate::status::Document;

#[derive(Args)]
pub(crate) struct ConnectivityArgs {
    /// Test all nodes and pods of the Kubernetes cluster that this file leads to [default: what kubectl
    /// uses, where the agent's records come from Kubernetes; else from this node to its peers]
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Kubernetes: test from this pod's own service account, or what kubectl uses, whatever the agent's
    /// configuration says
    #[arg(long)]
    kubernetes: bool,
    /// Kubernetes: where to run the pods of the test, which are removed again
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Kubernetes: where the agents run
    #[arg(long, default_value = "kube-system")]
    agents_namespace: String,
    /// Kubernetes: the agents' DaemonSet, whose image the test uses
    #[arg(long, default_value = "skein")]
    daemonset: String,
    /// Seconds that it all may take
    #[arg(long, default_value_t = 180.0)]
    timeout: f64,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Run in the test's own pods.
#[cfg(feature = "kubernetes")]
#[derive(Args)]
pub(crate) struct ProbeArgs {
    /// Answer probes on this TCP and UDP port
    #[arg(long)]
    answer: Option<u16>,
    /// Probe what this file lists, and print what came of it
    #[arg(long)]
    targets: Option<PathBuf>,
    /// Seconds that the probes may take
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
        matrix.note(status.node, Ok(probe::all(&targets, end)?));
        matrix
    };
    match arguments.output.output {
        Output::Json => print_json(&matrix)?,
        Output::Table => print(&matrix.render())?,
    }
    matrix.trouble().map_or(Ok(()), |trouble| Err(Failure::Runtime(anyhow!(trouble))))
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
    // Standard output is the matrix's.
    let say = |text: &str| eprintln!("{text}");
    Ok(runtime()?.block_on(kubernetes::test(&options, say))?)
}

#[cfg(not(feature = "kubernetes"))]
fn test_cluster(_: &ConnectivityArgs, _: Duration) -> Result<Matrix, Failure> {
    Err(crate::control::kubernetes::refusal())
}

/// As it is made: that of a large cluster is no text to hold.
fn print_json(matrix: &Matrix) -> Result<(), Failure> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let made = serde_json::to_writer_pretty(&mut out, matrix).map_err(std::io::Error::from);
    match made.and_then(|()| writeln!(out)).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("cannot print the answer", error))
        }
        _ => Ok(()),
    }
}

/// Every peer's node, by its addresses on the overlay.
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
    let file = arguments.targets.as_deref().context("use --answer or --targets")?;
    let targets = std::fs::File::open(file).and_then(pods::unpack);
    let targets =
        targets.with_context(|| format!("cannot read the targets in {}", file.display()))?;
    let row = probe::all(&targets, end)?;
    let text = serde_json::to_string(&row).context("cannot print the results")?;
    print(&(text + "\n"))
}

fn rand() -> u32 {
    let mut bytes = [0; 4];
    // Nothing secret: two tests are told apart, and probers do not begin with the same one.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u32::from_be_bytes(bytes)
}
