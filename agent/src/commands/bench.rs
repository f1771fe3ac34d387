//! `skein-agent bench`: throughput, round-trip time and packet rate between two nodes, over the
//! overlay and over the underlay.

mod measure;
pub(crate) mod protocol;
mod serve;

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use skein_core::address;

use self::measure::{Measured, Server};
use self::protocol::RequestError;
use super::{AgentArgs, Output, OutputArgs, json, print, report, runtime, seconds};
use crate::control::records::first_host;
use crate::failure::Failure;
use crate::status::{Align, Document, count, printable, table};

const OVERLAY: &str = "overlay";

/// Maximum value of `--seconds`.
const MAX_MEASUREMENT_SECONDS: f64 = 60.0;

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// Name of the peer, on which bench --serve must run
    #[arg(required_unless_present = "serve", requires = "token")]
    peer: Option<String>,
    /// Answer measurements of other nodes until --limit expires
    #[arg(long, conflicts_with = "peer")]
    serve: bool,
    /// Token that bench --serve prints on the peer
    #[arg(long)]
    token: Option<String>,
    /// TCP and UDP port of --serve
    #[arg(long, default_value_t = 51901)]
    port: u16,
    /// Seconds until --serve ends
    #[arg(long, default_value_t = 600.0)]
    limit: f64,
    /// Measure only over the overlay, not over the underlay; with --serve, answer only requests
    /// that arrive over the overlay
    #[arg(long)]
    overlay_only: bool,
    /// Duration of each measurement in seconds, 0.1 to 60
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Overlay address of the peer [default: the first host of its first pod CIDR]
    #[arg(long, value_parser = address::parse::<IpAddr>)]
    address: Option<IpAddr>,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Results over the overlay and, unless `--overlay-only` is given, over the underlay.
#[derive(Serialize)]
struct BenchResult {
    peer: String,
    overlay: NetworkResult,
    #[serde(rename = "beside")]
    underlay: Option<NetworkResult>,
}

/// Result over one network.
#[derive(Serialize)]
struct NetworkResult {
    address: IpAddr,
    #[serde(flatten)]
    measured: Option<Measured>,
    /// Reason that there is no measurement.
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
    if !(0.1..=MAX_MEASUREMENT_SECONDS).contains(&arguments.seconds) {
        return Err(Failure::Usage(format!(
            "--seconds is out of range. Use 0.1 to {MAX_MEASUREMENT_SECONDS}."
        )));
    }
    // clap requires both options without --serve.
    let name = arguments.peer.as_deref().unwrap_or_default();
    let token = arguments.token.as_deref().unwrap_or_default();
    let (overlay, underlay) = addresses(name, arguments.address, &status)?;
    let steps = Measured::STEPS * if arguments.overlay_only { 1 } else { 2 };
    let bar = progress(steps);
    let measure = |label: &'static str, address: IpAddr| {
        let time = Duration::from_secs_f64(arguments.seconds);
        let server = Server { address, port: arguments.port, token, time };
        let step = |what: &str| {
            bar.set_message(format!("{label}: {what}"));
            bar.inc(1);
        };
        let (measured, error) = match measure::measure(&server, step) {
            Ok(measured) => (Some(measured), None),
            // On the underlay, another program may listen on the port and send any text.
            Err(RequestError::Refused(why)) if label == OVERLAY => {
                return Err(Failure::Usage(format!("--token: {}", printable(&why))));
            }
            Err(error) => (None, Some(error.to_string())),
        };
        Ok(NetworkResult { address, measured, error })
    };
    let outcome = BenchResult {
        peer: name.to_owned(),
        overlay: measure(OVERLAY, overlay)?,
        underlay: match underlay {
            Some(underlay) if !arguments.overlay_only => Some(measure("underlay", underlay)?),
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
            "no measurement over the overlay: {error}. Check that skein-agent bench --serve runs on \
             {name}, and see skein-agent trace {} {name}.",
            status.node
        ))),
    }
}

/// Returns the peer's address on the overlay and, if an endpoint is known, on the underlay.
fn addresses(
    name: &str,
    overlay: Option<IpAddr>,
    status: &Document,
) -> Result<(IpAddr, Option<IpAddr>), Failure> {
    let peer = report(status)?.peers.iter().find(|peer| peer.name == name).ok_or_else(|| {
        Failure::Usage(format!("no peer has the name {name:?}. See skein-agent peers."))
    })?;
    let first = peer.pod_cidrs.first().map(first_host);
    let overlay = overlay.or(first).ok_or_else(|| {
        Failure::Usage(format!("{name} has no pod CIDR. Set its address with --address."))
    })?;
    Ok((overlay, peer.endpoint.map(|endpoint| endpoint.ip())))
}

/// Creates a progress bar on standard error, which is shown on a terminal only.
fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn render(outcome: &BenchResult) -> String {
    type Value = fn(&Measured) -> f64;
    let rows: [(&str, &str, Value); 7] = [
        ("TCP to the peer", "bit/s", |m| m.upload_bits_per_second),
        ("TCP from the peer", "bit/s", |m| m.download_bits_per_second),
        ("round-trip time, median", "µs", |m| m.round_trip_p50_us),
        ("round-trip time, 99 %", "µs", |m| m.round_trip_p99_us),
        ("UDP of 64 bytes, sent", "packets/s", |m| m.udp_sent_per_second),
        ("UDP of 64 bytes, received", "packets/s", |m| m.udp_received_per_second),
        ("UDP lost", "%", |m| m.udp_lost_percent),
    ];
    let shown = |value: f64, unit: &str| match unit {
        "%" | "µs" => format!("{value:.1}"),
        _ => count(value as u64),
    };
    let overlay = outcome.overlay.measured.as_ref();
    let underlay = outcome.underlay.as_ref().and_then(|result| result.measured.as_ref());
    let row = |(name, unit, value): &(&str, &str, Value)| {
        let text =
            |m: Option<&Measured>| m.map_or_else(|| "-".to_owned(), |m| shown(value(m), unit));
        let ratio = match (overlay.map(value), underlay.map(value)) {
            (Some(a), Some(b)) if b > 0.0 && *unit != "%" => format!("{:.2}", a / b),
            _ => "-".to_owned(),
        };
        vec![(*name).to_owned(), (*unit).to_owned(), text(overlay), text(underlay), ratio]
    };
    let columns = [
        ("MEASUREMENT", Align::Left),
        ("UNIT", Align::Left),
        ("OVERLAY", Align::Right),
        ("UNDERLAY", Align::Right),
        ("RATIO", Align::Right),
    ];
    let mut text = table(&columns, rows.iter().map(row)) + "\n";
    let failed =
        outcome.underlay.iter().filter_map(|result| Some((result.address, result.error.as_ref()?)));
    for (address, error) in failed {
        let error = printable(error);
        text += &format!(
            "\nno measurement over the underlay, at {address}: {error}. A firewall may drop packets \
             to this port, or --serve runs with --overlay-only.\n"
        );
    }
    text
}
