//! `skein-agent trace`: route of a packet step by step, and dropped packets.

mod drops;
mod facts;
mod judge;

use std::net::IpAddr;

use anyhow::anyhow;
use clap::Args;
use skein_core::address;

use self::facts::Facts;
use self::judge::{Grade, Trace};
use super::{AgentArgs, Output, OutputArgs, json, print, runtime};
use crate::failure::Failure;
use crate::status::{Align, Document, Field, Tone, table};

#[derive(Args)]
pub(crate) struct TraceArgs {
    /// Sender: an IP address, or the name of a node
    #[arg(required_unless_present = "drops")]
    from: Option<String>,
    /// Destination: an IP address, or the name of a node
    #[arg(required_unless_present = "drops")]
    to: Option<String>,
    /// Show packets while they are dropped, until Ctrl-C
    #[arg(long, conflicts_with_all = ["from", "to"])]
    drops: bool,
    /// Maximum number of dropped packets
    #[arg(long, requires = "drops")]
    count: Option<u64>,
    /// Maximum duration in seconds
    #[arg(long, requires = "drops")]
    seconds: Option<f64>,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn trace(arguments: &TraceArgs) -> Result<(), Failure> {
    let output = arguments.output.output;
    let agent = arguments.agent.agent()?;
    let (Some(from), Some(to)) = (&arguments.from, &arguments.to) else {
        let duration = arguments.seconds.map(|s| super::seconds("--seconds", s)).transpose()?;
        let limits = drops::Limits { count: arguments.count, duration };
        return runtime()?.block_on(drops::follow(&agent, &limits, output));
    };
    let trace = runtime()?.block_on(async {
        let status = agent.status().await?;
        // Only the data process knows the owner of an address.
        super::report(&status)?;
        let (from, to) = (resolve(from, &status)?, resolve(to, &status)?);
        if from.is_ipv4() != to.is_ipv4() {
            return Err(Failure::Usage(format!(
                "{from} and {to} have different address families. Use two addresses of one family."
            )));
        }
        let facts = Facts::gather(from, to, status).await?;
        match facts.remote_sender() {
            Some(node) => Err(Failure::Usage(format!(
                "{from} belongs to {0}. Run this command on {0}.",
                node.name
            ))),
            None => Ok(judge::judge(&facts)),
        }
    })?;
    print(&match output {
        Output::Json => json(&trace)?,
        Output::Table => render(&trace),
    })?;
    match trace.passes {
        true => Ok(()),
        false => Err(Failure::Runtime(anyhow!("the packet is not delivered: {}", trace.verdict))),
    }
}

/// Parses an address, or returns the overlay address of a node: the first host of its first pod
/// CIDR.
fn resolve(what: &str, status: &Document) -> Result<IpAddr, Failure> {
    if let Ok(address) = address::parse(what) {
        return Ok(address);
    }
    if what == status.node
        && let Some(address) = status.interface.addresses.first()
    {
        return Ok(*address);
    }
    let peers = status.report.iter().flat_map(|report| &report.peers);
    let cidr = peers.filter(|peer| peer.name == what).find_map(|peer| peer.pod_cidrs.first());
    let address = cidr.map(crate::control::records::first_host);
    address.ok_or_else(|| {
        Failure::Usage(format!(
            "{what:?} is neither an IP address nor a known node. See skein-agent peers."
        ))
    })
}

fn render(trace: &Trace) -> String {
    let row = |step: &judge::Step| -> Vec<Field> {
        let (state, tone) = match step.grade {
            Grade::Good => ("ok", Tone::Good),
            Grade::Note => ("note", Tone::Warn),
            Grade::Bad => ("STOP", Tone::Bad),
        };
        vec![step.name.into(), Field::toned(state, tone), step.detail.as_str().into()]
    };
    let columns = [("STEP", Align::Left), ("RESULT", Align::Left), ("DETAIL", Align::Left)];
    let steps = table(&columns, trace.steps.iter().map(row));
    format!("{} to {}\n\n{steps}\n\n{}\n", trace.from, trace.to, trace.verdict)
}
