//! `skein-agent bench`: what a pair of nodes can do, over the overlay and beside it.

mod measure;
pub(crate) mod protocol;
mod serve;

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use skein_core::address;

use self::measure::{Measured, Other};
use self::protocol::AskError;
use super::{AgentArgs, Output, OutputArgs, json, print, report, runtime, seconds};
use crate::control::desired::first_host;
use crate::failure::Failure;
use crate::status::{Align, Document, count, printable, table};

const OVERLAY: &str = "overlay";

/// The longest that one measurement may take, in seconds.
const LONGEST: f64 = 60.0;

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// The peer's name, as skein-agent peers has it; --serve has to run there
    #[arg(required_unless_present = "serve", requires = "token")]
    peer: Option<String>,
    /// Answer the measurements of other nodes, until --limit is over
    #[arg(long, conflicts_with = "peer")]
    serve: bool,
    /// What --serve has printed on the peer
    #[arg(long)]
    token: Option<String>,
    /// TCP and UDP port of --serve
    #[arg(long, default_value_t = 51901)]
    port: u16,
    /// With --serve: seconds until it ends
    #[arg(long, default_value_t = 600.0)]
    limit: f64,
    /// Nothing beside the overlay: with --serve only who comes over the overlay is answered
    #[arg(long)]
    overlay_only: bool,
    /// Seconds that each measurement takes, up to 60
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// The peer's address on the overlay [default: the first of its first pod CIDR]
    #[arg(long, value_parser = address::parse::<IpAddr>)]
    address: Option<IpAddr>,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Both ways side by side.
#[derive(Serialize)]
struct Outcome {
    peer: String,
    overlay: Way,
    beside: Option<Way>,
}

#[derive(Serialize)]
struct Way {
    address: IpAddr,
    #[serde(flatten)]
    measured: Option<Measured>,
    /// Why there is nothing.
    error: Option<String>,
}

pub(crate) fn bench(arguments: &BenchArgs) -> Result<(), Failure> {
    let agent = arguments.agent.agent()?;
    let limit = seconds("--limit", arguments.limit)?;
    let status = runtime()?.block_on(agent.status())?;
    if arguments.serve {
        let overlay = arguments.overlay_only.then(|| status.interface.addresses.clone());
        return serve::serve(&status.node, arguments.port, overlay, limit);
    }
    if !(0.1..=LONGEST).contains(&arguments.seconds) {
        return Err(Failure::Usage(format!("--seconds: use 0.1 to {LONGEST}")));
    }
    // The command line has seen to both.
    let name = arguments.peer.as_deref().unwrap_or_default();
    let token = arguments.token.as_deref().unwrap_or_default();
    let (overlay, beside) = addresses(name, arguments.address, &status)?;
    let steps = Measured::STEPS * if arguments.overlay_only { 1 } else { 2 };
    let bar = progress(steps);
    let measure = |label: &'static str, address: IpAddr| {
        let time = Duration::from_secs_f64(arguments.seconds);
        let other = Other { address, port: arguments.port, token, time };
        let step = |what: &str| {
            bar.set_message(format!("{label}: {what}"));
            bar.inc(1);
        };
        let (measured, error) = match measure::measure(&other, step) {
            Ok(measured) => (Some(measured), None),
            // Beside the overlay anybody may listen there, and say anything.
            Err(AskError::Refused(why)) if label == OVERLAY => {
                return Err(Failure::Usage(format!("--token: {}", printable(&why))));
            }
            Err(error) => (None, Some(error.to_string())),
        };
        Ok(Way { address, measured, error })
    };
    let outcome = Outcome {
        peer: name.to_owned(),
        overlay: measure(OVERLAY, overlay)?,
        beside: match beside {
            Some(beside) if !arguments.overlay_only => Some(measure("beside", beside)?),
            _ => None,
        },
    };
    bar.finish_and_clear();
    print(&match arguments.output.output {
        Output::Json => json(&outcome)?,
        Output::Table => render(&outcome),
    })?;
    match &outcome.overlay.error {
        None => Ok(()),
        Some(error) => Err(Failure::Runtime(anyhow::anyhow!(
            "no measurement over the overlay: {error}: does skein-agent bench --serve run on {name}? \
             (skein-agent trace {} {name})",
            status.node
        ))),
    }
}

/// The peer on the overlay, and beside it.
fn addresses(
    name: &str,
    overlay: Option<IpAddr>,
    status: &Document,
) -> Result<(IpAddr, Option<IpAddr>), Failure> {
    let peer = report(status)?.peers.iter().find(|peer| peer.name == name).ok_or_else(|| {
        Failure::Usage(format!("no peer is called {name:?}: see skein-agent peers"))
    })?;
    let first = peer.pod_cidrs.first().map(first_host);
    let overlay = overlay.or(first).ok_or_else(|| {
        Failure::Usage(format!("{name} has no pod CIDR: name its address with --address"))
    })?;
    Ok((overlay, peer.endpoint.map(|endpoint| endpoint.ip())))
}

/// On a terminal only.
fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn render(outcome: &Outcome) -> String {
    type Value = fn(&Measured) -> f64;
    let rows: [(&str, &str, Value); 7] = [
        ("TCP to the peer", "bit/s", |m| m.upload_bits_per_second),
        ("TCP from the peer", "bit/s", |m| m.download_bits_per_second),
        ("round trip, median", "µs", |m| m.round_trip_p50_us),
        ("round trip, 99 %", "µs", |m| m.round_trip_p99_us),
        ("UDP of 64 bytes, sent", "packets/s", |m| m.udp_sent_per_second),
        ("UDP of 64 bytes, received", "packets/s", |m| m.udp_received_per_second),
        ("UDP lost", "%", |m| m.udp_lost_percent),
    ];
    let shown = |value: f64, unit: &str| match unit {
        "%" | "µs" => format!("{value:.1}"),
        _ => count(value as u64),
    };
    let overlay = outcome.overlay.measured.as_ref();
    let beside = outcome.beside.as_ref().and_then(|way| way.measured.as_ref());
    let row = |(name, unit, value): &(&str, &str, Value)| {
        let text =
            |m: Option<&Measured>| m.map_or_else(|| "-".to_owned(), |m| shown(value(m), unit));
        let ratio = match (overlay.map(value), beside.map(value)) {
            (Some(a), Some(b)) if b > 0.0 && *unit != "%" => format!("{:.2}", a / b),
            _ => "-".to_owned(),
        };
        vec![(*name).to_owned(), (*unit).to_owned(), text(overlay), text(beside), ratio]
    };
    let columns = [
        ("WHAT", Align::Left),
        ("UNIT", Align::Left),
        ("OVERLAY", Align::Right),
        ("BESIDE", Align::Right),
        ("RATIO", Align::Right),
    ];
    let mut text = table(&columns, rows.iter().map(row)) + "\n";
    let beside = outcome.beside.iter().filter_map(|way| Some((way.address, way.error.as_ref()?)));
    for (address, error) in beside {
        let error = printable(error);
        text += &format!(
            "\nnothing was measured beside the overlay, at {address}: {error}: the firewall lets \
             nothing through to that port, or --serve was given --overlay-only\n"
        );
    }
    text
}
